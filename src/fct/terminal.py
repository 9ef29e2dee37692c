"""What is shown to people: names of files and columns, messages of stores, texts in models and journals come from
others, so none of them reaches a terminal as a command to it, nor as markup."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["PlainConsole", "plain_log", "printable"]


def printable(text: str) -> str:
    r"""``text`` on one line, every character that is not printable written as Python writes it in a string.

    Line breaks, escape sequences, marks that turn the reading direction around and halves of a surrogate pair (bytes of
    a file name that are not UTF-8) are among them.

    Examples:
        >>> from fct.terminal import printable
        >>> print(printable("a\x1b[31mred\nb"))
        a\x1b[31mred\nb
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Plain(logging.Filter):
    """Messages of a log name files and tables of others, and without a handler Python prints them as they are."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


_PLAIN = _Plain()


def plain_log(name: str) -> logging.Logger:
    """The logger of that name, whose messages are :func:`printable`."""
    log = logging.getLogger(name)
    log.addFilter(_PLAIN)
    return log


class PlainConsole(Console):
    """A console on which every string, in tables too, is text: :func:`printable`, with no markup and no emoji codes.

    Style is a ``rich.text.Text``, as :meth:`say` makes them.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **how})

    def render_str(self, text: str, **how: Any) -> Text:  # the one place through which rich leads every string
        how |= {"markup": False, "emoji": False}
        return super().render_str(printable(text), **how)

    def lines(self, text: str) -> None:
        """A text of ours that has lines, each as it is however long."""
        for line in text.split("\n"):
            self.print(line, highlight=False, soft_wrap=True)

    def say(self, head: str, text: str, style: str = "bold") -> None:
        """``head``, in ``style``, and ``text`` behind it, on one line however long it is."""
        self.print(Text.assemble((printable(head), style), " ", printable(text)), highlight=False, soft_wrap=True)
