"""Ctrl-C while Ray's workers map: what is under way is waited for, and said."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from fct.backfilling import ray_run


class Interrupted:
    """A Ray of one worker that is ready and has done nothing yet when Ctrl-C comes."""

    def __init__(self) -> None:
        self.waited: list[int] = []
        self.killed: list[object] = []
        names = ("ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "NodeDiedError", "ObjectLostError")
        kinds = {name: type(name, (Exception,), {}) for name in (*names, "RayActorError", "RayTaskError")}
        self.exceptions = SimpleNamespace(**kinds)
        method = SimpleNamespace(remote=lambda *_: object())
        made = SimpleNamespace(remote=lambda *_: Actor(method))
        self.remote = lambda _: SimpleNamespace(options=lambda **_: made)

    def is_initialized(self) -> bool:
        return True

    def put(self, found: object) -> object:
        return found

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {"CPU": 1}}]

    def wait(
        self, refs: list[object], *, num_returns: int, timeout: float | None = None
    ) -> tuple[list[object], object]:
        self.waited.append(num_returns)
        if len(self.waited) == 2:  # its shards are handed out
            raise KeyboardInterrupt
        return refs[:1], refs[1:]

    def get(self, ref: object) -> object:
        return True

    def kill(self, actor: object) -> None:
        self.killed.append(actor)


@dataclass(frozen=True, eq=False)
class Actor:
    method: SimpleNamespace

    @property
    def ready(self) -> SimpleNamespace:
        return self.method

    run = ready


def test_what_is_under_way_is_waited_for_before_the_workers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Interrupted()
    monkeypatch.setattr(ray_run, "need", lambda *_: ray)
    found, shards = SimpleNamespace(device="cpu"), [SimpleNamespace(rows=1) for _ in range(5)]
    said: list[str] = []
    monkeypatch.setattr(ray_run._log, "warning", lambda text, *words: said.append(text % words))
    with pytest.raises(KeyboardInterrupt):
        list(ray_run.run_on_ray(found, None, shards, address="auto", cpus=1, threads=1, bar=None))  # type: ignore[arg-type]  # a stand-in
    assert said == ["finishing 3 shards, press Ctrl-C again to leave them"]
    assert ray.waited == [1, 1, 3]
    assert len(ray.killed) == 1
