"""Text of a user's as it may stand in a page."""

from __future__ import annotations

import html
import unicodedata

__all__ = ["escaped"]


def escaped(value: object) -> str:
    """Without markup, and without what a terminal or a browser would obey: control characters, marks that turn text
    round.

    Examples:
        >>> from fct.report.escaped_text import escaped
        >>> escaped("<b>&")
        '&lt;b&gt;&amp;'
    """
    plain = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{ord(c):04x}"
        for c in str(value)
    )
    return html.escape(plain)
