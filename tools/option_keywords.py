"""Writes ``src/fct/options/keywords.py``: the options' groups and sets as TypedDicts, which type checkers can unpack.

Run it after an option was added to ``src/fct/options/groups.py``: ``python -m tools.option_keywords``.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from pathlib import Path

from fct.options import groups
from fct.options.declare import Group, OptionSet

PATH = Path(__file__).parents[1] / "src/fct/options/keywords.py"
HEAD = '''"""The options of :mod:`fct.options.groups` as keywords, for type checkers and editors.

Written by ``python -m tools.option_keywords``; change the groups, not this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

{types}

__all__ = [
{names}
]
'''
TYPES = (
    "CodeArray",
    "CodeNumber",
    "DType",
    "FileSystem",
    "Format",
    "GalleryLike",
    "Precision",
    "StorageOptions",
    "TransformationLike",
    "VectorFormat",
)


def keywords_name(cls: type) -> str:
    """StoreAccess -> StoreAccessKeywords, BackfillOptions -> BackfillKeywords."""
    return cls.__name__.removesuffix("Options") + "Keywords"


def rendered() -> str:
    """The file's text."""
    found = [c for _, c in inspect.getmembers(groups, inspect.isclass) if c.__module__ == groups.__name__]
    found.sort(key=lambda c: inspect.getsourcelines(c)[1])
    parts = [HEAD]
    for cls in found:
        name, doc = keywords_name(cls), inspect.getdoc(cls)
        if issubclass(cls, Group):
            body = [f"class {name}(TypedDict, total=False):", f'    """{doc}"""', ""]
            for f in dataclasses.fields(cls):
                kind = str(f.type).replace("'", '"')
                body.append(f"    {f.name}: {kind}")
                text = textwrap.fill(f.metadata["help"], 113).splitlines()
                body.append('    """' + "\n    ".join(text) + '"""')
            parts.append("\n".join(body) + "\n")
        elif issubclass(cls, OptionSet):
            bases = ", ".join(keywords_name(group) for group in cls.groups().values())
            head = f"class {name}({bases}, total=False):"
            if len(head) > 120:
                inner = "".join(f"    {keywords_name(group)},\n" for group in cls.groups().values())
                head = f"class {name}(\n{inner}    total=False,\n):"
            parts.append(f'{head}\n    """{doc}"""\n')
    whole = "\n\n".join(parts)
    names = "\n".join(f'    "{name}",' for name in sorted(keywords_name(c) for c in found))
    kinds = [str(f.type) for c in found for f in dataclasses.fields(c)]  # type: ignore[arg-type]
    used = [t for t in TYPES if any(t in kind for kind in kinds)]
    imported = f"from fct.types import {', '.join(used)}"
    if len(imported) > 120:
        imported = "from fct.types import (\n" + "".join(f"    {t},\n" for t in used) + ")"
    return whole.replace("{types}", imported).replace("{names}", names)


if __name__ == "__main__":
    PATH.write_text(rendered())
