"""What people read: the table, the sentence, the picture and one self-contained HTML page."""

from fct.report.html import write_html
from fct.report.plots import Example, write_picture
from fct.report.table import ResultTable, Row
from fct.report.verdict import Verdict, judge

__all__ = ["Example", "ResultTable", "Row", "Verdict", "judge", "write_html", "write_picture"]
