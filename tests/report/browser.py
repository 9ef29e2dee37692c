"""A page in a real browser, without a head: what it complains about, and how it measures."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["BROWSER", "scripts_of", "seen_in_a_browser"]

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_WATCH = """<script>window.problems = [];
addEventListener("error", e => problems.push(e.message));
addEventListener("securitypolicyviolation", e => problems.push(e.violatedDirective));</script>"""


def scripts_of(text: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", text, re.DOTALL)


def seen_in_a_browser(page: Path, script: str, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What ``script`` returns in the page, and the problems there were.

    In a frame of that width: no window of Chromium is narrower than 500.
    """
    ask = f'<script>parent.postMessage(JSON.stringify({{problems, ...(() => {{{script}}})()}}), "*");</script>'
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'"
        for one in scripts_of(_WATCH + ask)
    )
    text = page.read_text().replace("script-src ", f"script-src {hashes} ")
    text = text.replace("<body>", f"<body>{_WATCH}").replace("</body>", f"{ask}</body>")
    opened = page.with_name("opened.html")
    opened.write_text(
        "<!doctype html><body><script>addEventListener('message', e => document.body.dataset.seen = e.data)</script>"
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(text)}"></iframe></body>'
    )
    with tempfile.TemporaryDirectory() as profile:
        command = [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []), opened.as_uri(),
        ]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, dom[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen
