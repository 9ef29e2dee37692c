"""Relevance judgements ("qrels"): which items answer a query, and how well."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np

from fct.checks import check_items, check_path, shown
from fct.errors import FctError

__all__ = ["Judgements", "id_text", "read_qrels"]


@dataclass(frozen=True, slots=True)
class Judgements:
    """Grades by query and item. A grade above 0 means relevant; 0 and below, judged and found not to be.

    grades: query id -> item id -> grade. Ids are text, as they are in files of judgements: 7 and "7" are one id.

    Examples:
        >>> from fct.judging import Judgements
        >>> Judgements.of(["q1", "q1"], [7, 8], [2, 0]).relevant("q1")
        {'7': 2}
    """

    grades: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, queries: Iterable[object], items: Iterable[object], grades: Iterable[object]) -> Judgements:
        """From three columns of one length, a row for each judgement.

        Raises:
            ValueError: columns of different lengths, a missing id, a grade that is no whole number, or a pair that is
                judged twice with different grades.
        """
        table: dict[str, dict[str, int]] = {}
        given = [
            check_items(column, f"qrels: {name}", "a column")
            for name, column in (("queries", queries), ("items", items), ("grades", grades))
        ]
        if len({len(column) for column in given}) > 1:
            sizes = ", ".join(str(len(column)) for column in given)
            raise ValueError(f"qrels: expected queries, items and grades of one length, got {sizes}")
        for row, (query, item, grade) in enumerate(zip(*given, strict=True)):
            q, i, g = _id(query, "query", row), _id(item, "item", row), _grade(grade, row)
            if table.setdefault(q, {}).setdefault(i, g) != g:
                raise ValueError(
                    f"qrels: expected one grade for query {shown(q)} and item {shown(i)}, got {table[q][i]} and "
                    f"{g} (judgement {row})"
                )
        return cls(table)

    def relevant(self, query: str) -> dict[str, int]:
        """The items that answer ``query``, with their grades above 0."""
        return {item: grade for item, grade in self.grades.get(query, {}).items() if grade > 0}

    @property
    def queries(self) -> tuple[str, ...]:
        return tuple(self.grades)

    def unknown_items(self, items: Iterable[str]) -> tuple[str, ...]:
        """Ids of items judged relevant that are not among ``items``, in the order of the file."""
        known = set(items)
        seen = dict.fromkeys(item for query in self.grades for item in self.relevant(query) if item not in known)
        return tuple(seen)


def read_qrels(path: str | os.PathLike[str]) -> Judgements:
    """Judgements from a file, by what its lines look like.

    TREC: ``query 0 item grade`` between blanks. BEIR: tabs below a head ``query-id corpus-id score`` (any three names).
    Three columns between tabs without a head are read as query, item and grade.

    Raises:
        FileNotFoundError: no such file. FctError: a line that is neither, named by its number.

    Examples:
        >>> import pathlib, tempfile
        >>> from fct.judging import read_qrels
        >>> file = pathlib.Path(tempfile.mkdtemp(), "qrels.txt")
        >>> _ = file.write_text("q1 0 d7 2\\nq1 0 d9 0\\n")
        >>> read_qrels(file).relevant("q1")
        {'d7': 2}
    """
    file = check_path(path, "qrels", "the path of a file of judgements")
    if not file.is_file():
        raise FileNotFoundError(f"qrels: expected a file of judgements, found none at {file}")
    columns: tuple[list[str], list[str], list[str]] = ([], [], [])
    for number, fields, tabs in _lines(file):
        trec = len(fields) == 4
        if trec:  # the second column is the iteration, which nobody uses
            fields = [fields[0], *fields[2:]]
        if len(fields) != 3:
            raise FctError(
                f"qrels: expected 'query 0 item grade' (TREC) or 'query item grade' between tabs (BEIR), got "
                f"{shown(' '.join(fields))} in line {number} of {file}"
            )
        if number == 1 and tabs and not trec and not _number(fields[2]):
            continue  # BEIR's head
        if not _whole(fields[2]):
            raise FctError(f"qrels: expected a whole number as grade, got {shown(fields[2])}, line {number} of {file}")
        for column, field in zip(columns, fields, strict=True):
            column.append(field)
    if not columns[0]:
        raise FctError(f"qrels: expected at least one judgement, {file} has none")
    try:
        return Judgements.of(*columns)
    except ValueError as error:
        raise FctError(f"{error}, in {file}") from error


def _lines(file: Path) -> Iterable[tuple[int, list[str], bool]]:
    """(line number, its fields, whether these stand between tabs), which they do where there are some; else blanks."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            for number, line in enumerate(text, 1):
                if not line.strip():
                    continue
                tabs = "\t" in line
                fields = next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE)) if tabs else line.split()
                yield number, [field.strip() for field in fields], tabs
    except UnicodeDecodeError as error:
        raise FctError(f"qrels: expected text in UTF-8, {file} is not: {error}") from error


def _whole(text: str) -> bool:
    """A whole number of at most 18 digits: a grade, not a hash that stands in the wrong column."""
    return text.isascii() and text.removeprefix("-").isdecimal() and len(text) <= 18


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _id(value: object, what: str, row: int) -> str:
    text = id_text(value)
    if text is None:
        got = "none" if value is None or value == "" or value != value else shown(value)
        article = "an" if what == "item" else "a"
        raise ValueError(f"qrels: expected {article} {what} id, got {got} in judgement {row}")
    return text


def id_text(value: object) -> str | None:
    """An id as text: 7 and "7" are one, and so are b"a" and "a". None for what is no id: nothing, NaN, a list."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return repr(value)
    if isinstance(value, (str, int, UUID)) or (isinstance(value, float) and value == value):
        return str(value) or None
    return None


def _grade(value: object, row: int) -> int:
    if isinstance(value, str) and _whole(value):
        return int(value)
    if isinstance(value, (int, float, np.integer, np.floating)) and abs(value) < 1e18 and float(value).is_integer():
        return int(value)
    raise ValueError(f"qrels: expected a whole number as grade, got {shown(value)} in judgement {row}")
