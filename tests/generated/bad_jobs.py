"""A job that does everything wrong, for the test of the sandbox."""

from __future__ import annotations

import os
import signal
from pathlib import Path


class Bad:
    modules: tuple[str, ...] = ()
    memory = 1 << 28

    def make(self, folder: Path) -> None:
        pass

    def case(self, folder: Path, number: int, seed: int) -> str:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2:
            bytearray(1 << 29)
        if number == 3:
            raise ValueError("3")
        return "fine"


JOBS = {"bad": Bad()}
