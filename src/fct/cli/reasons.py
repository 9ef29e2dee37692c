"""Reasons in full sentences, said once, below the table whose rows refer to them by number."""

from __future__ import annotations

from collections.abc import Sequence

from fct.cli.console import console

__all__ = ["Reasons"]


class Reasons:
    """Numbers each sentence at its first use.

    Examples:
        >>> from fct.cli.reasons import Reasons
        >>> reasons = Reasons()
        >>> reasons.no(["no driver", "no memory"]), reasons.no(["no driver"]), reasons.of([])
        ('no (1, 2)', 'no (1)', '')
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def of(self, sentences: Sequence[str]) -> str:
        """ "(1, 2)", or nothing where there is no reason."""
        numbers = [self._numbers.setdefault(text, len(self._numbers) + 1) for text in dict.fromkeys(sentences) if text]
        return f"({', '.join(str(number) for number in numbers)})" if numbers else ""

    def no(self, sentences: Sequence[str]) -> str:
        """ "no (1, 2)"."""
        return f"no {self.of(sentences)}".rstrip()

    def show(self) -> None:
        """Prints the sentences, one a line."""
        for text, number in self._numbers.items():
            console.print(f"({number}) {text}", highlight=False)
