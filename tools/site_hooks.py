"""What the site shows of the project outside docs/: the report, the change log, the examples.

mkdocs reads docs/ alone. This adds the files that its pages link to, under project/, and turns links that leave docs/
(``../examples/upgrade.py``, which is right in a checkout) into links to them. It lists the keywords that a function
takes.
"""

from __future__ import annotations

import pydoc
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = (
    "benchmarks/report/*",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "KERNELS.md",
    "examples/*",
)


def on_files(files: Files, config: Any) -> Files:
    """Adds what SHOWN names to the site's files."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                name = f"project/{path.relative_to(ROOT).as_posix()}"
                files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ become links into project/; from within project/, links into docs/ become the site's own."""
    markdown = re.sub(r"(?m)^::: (fct\.[\w.]+)$", lambda match: match[0] + keywords_of(match[1]), markdown)
    here = page.file.src_uri
    if here.startswith("project/"):
        up = "../" * (here.count("/"))
        return re.sub(r"\]\((?:\.\./)*docs/", f"]({up}", markdown)
    return re.sub(r"\]\(\.\./(?!\.\.)", "](" + "../" * here.count("/") + "project/", markdown)


def keywords_of(name: str) -> str:
    """The keywords of a function that takes options, as a list to stand below it; else nothing.

    mkdocstrings reads the source, where they are one ``**options``; what help() shows is made when fct is imported.
    """
    _, mark, listed = (pydoc.locate(name).__doc__ or "").partition("\nKeyword Args:\n")
    if not mark:
        return ""
    entries = re.findall(r"^    (\w+) \((.*?)\): (.*?)(?=\n    \w|\Z)", listed, re.MULTILINE | re.DOTALL)
    lines = [f"- **`{key}`** (`{kind}`) – {' '.join(text.split())}" for key, kind, text in entries]
    return "\n".join([f"\n\n**Keywords of `{name.removeprefix('fct.')}`**", "", *lines, ""])


def on_post_page(output: str, **_: Any) -> str:
    """Sphinx's roles, which help() shows well, are plain code on a page."""
    return re.sub(r":(?:class|func|meth|mod|data):(?=<code)", "", output)
