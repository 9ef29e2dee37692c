"""Fits that are kept: what was fitted on the same pairs by the same settings before is read, and not fitted again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import fct
from fct.progress import step_bar

__all__ = ["KeptFits"]


class KeptFits:
    """A folder of artifacts, and a bar over ``count`` fits with a line for each one that is done.

    A name alone does not tell which fit it was: the file's name holds a digest of the pairs and the settings too. The
    folder is to be emptied after a change of the recipe itself.
    """

    def __init__(self, folder: Path | None, count: int, *, progress: bool = True) -> None:
        self._folder, self._count, self._done = folder, count, 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._bar = step_bar(progress)
        self._task = self._bar.add_task("fits", total=count)

    def __enter__(self) -> KeptFits:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def fit(self, name: str, old: Any, side: Any, new: Any, **settings: Any) -> fct.Transformation:
        """``fct.fit_transformation(old, side, new, **settings)``, or what it gave in a run before.

        A stopped fit goes on from its checkpoint, which lies beside the artifacts.
        """
        space = fct.EmbeddingSpace("new", new.shape[1], normalised=True)
        if self._folder is None:
            return fct.fit_transformation(old, side, new, new_space=space, progress=False, **settings)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for rows in (old, side, new):
            stored = getattr(rows, "values", rows)  # of packed and scaled rows
            digest.update(b"none" if rows is None else np.ascontiguousarray(stored).tobytes())
        path = self._folder / f"{name}-{digest.hexdigest()[:12]}.safetensors"
        if path.exists():
            return fct.Transformation.load(path)
        h = fct.fit_transformation(
            old, side, new, new_space=space, progress=False, checkpoint=path.with_suffix(".part"), **settings
        )
        h.save(path)
        return h

    def tell(self, line: str) -> None:
        """One fit is done and measured."""
        self._done += 1
        self._bar.update(self._task, advance=1)
        self._bar.console.print(f"{self._done}/{self._count} {line}", highlight=False, markup=False)
