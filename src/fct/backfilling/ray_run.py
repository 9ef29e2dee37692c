"""The same shards on a Ray cluster: one actor per GPU or per n CPUs, shards handed out as actors come free.

The journal is what makes it exactly once: a shard whose worker died has no marker and is handed out again; a worker
that was only thought dead publishes the same bytes under the same names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from fct.backfilling.job import Job
from fct.backfilling.marker import Marker
from fct.backfilling.resolve import Resolved
from fct.errors import BackfillError
from fct.extras import need
from fct.gallery.interfaces import Shard
from fct.terminal import plain_log

if TYPE_CHECKING:
    from fct.backfilling.backfill_bar import Bar

__all__ = ["check_ray", "run_on_ray"]

_log = plain_log("fct.gallery")
_PER_ACTOR = 3  # shards handed to an actor at once: it reads one ahead and writes one behind


class _Worker:
    """What an actor is: a pipeline, fed shard by shard from several calls at once."""

    def __init__(self, found: Resolved, job: Job, threads: int) -> None:
        if found.journal.job() is None:
            raise BackfillError(
                f"journal: expected a folder that every node of the cluster sees, {found.journal.root} is not there on "
                "one: name a shared one with --journal (journal=), or leave the journal in the destination"
            )
        self._pipeline = found.pipeline(job, threads=threads)

    def ready(self) -> bool:
        return True

    def run(self, shard: Shard) -> Marker:
        return self._pipeline.submit(shard).result()


def check_ray(found: Resolved, cpus: int) -> None:
    """Raises, before anything is written, for what can never run on a cluster.

    Raises:
        MissingExtraError: no Ray. ValueError: no number of CPUs, or a function (reembed) that cannot be sent to a
        worker.
    """
    need("ray", "ray")
    if isinstance(cpus, bool) or not isinstance(cpus, int) or cpus < 1:
        raise ValueError(f"ray_cpus: expected a positive number, got {cpus!r}")
    if found.reembedding is not None and found.reembedding.ask is not None:
        pickler: Any = need("ray.cloudpickle", "ray")
        try:
            pickler.dumps(found.reembedding.ask)
        except Exception as error:  # whatever an object's own __reduce__ raises
            raise ValueError(
                "reembed: expected a function that Ray can send to its workers, this one holds what cannot be sent "
                f"({type(error).__name__}: {error}): open connections and models inside the function, at its first call"
            ) from error


def _start(ray: Any, address: str) -> None:
    """Starts Ray here (``local``) or connects to a cluster."""
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False)
    except Exception as error:  # Ray raises Exception itself where a node does not start in time
        ray.shutdown()  # what it left half-started
        said = f"({type(error).__name__}: {error})"
        kept = "What is done is kept: the same call goes on, with ray or without"
        if address == "local":
            raise BackfillError(
                f"ray: Ray did not start on this machine {said}: try again, or start it alone with `ray start --head` "
                f'and pass ray="auto"; its logs lie in /tmp/ray/session_latest/logs. {kept}'
            ) from error
        raise BackfillError(
            f"ray: expected the address of a running cluster, got {address!r} {said}: see whether `ray status` answers "
            f"on this machine, and whether Ray and Python have the cluster's versions. {kept}"
        ) from error


def run_on_ray(
    found: Resolved,
    job: Job,
    todo: list[Shard],
    *,
    address: str,
    cpus: int,
    threads: int | None,
    bar: Bar,
) -> Generator[Marker, None, None]:
    """Yields the marker of each shard as it is done. Raises what a shard raised; lost workers are replaced."""
    ray = need("ray", "ray")
    started = not ray.is_initialized()
    if started:
        _start(ray, address)
    gpus = 1 if found.device.startswith("cuda") else 0
    make: Any = ray.remote(_Worker).options(
        num_cpus=cpus, num_gpus=gpus, max_concurrency=_PER_ACTOR + 1, max_restarts=0, scheduling_strategy="SPREAD"
    )
    kept = ray.put(found)
    left = deque(todo)
    waiting: dict[Any, Any] = {}  # an actor's ready() -> the actor
    running: dict[Any, tuple[Any, Shard]] = {}  # run() -> (actor, shard)
    load: dict[Any, int] = {}  # ready actors -> shards under way there
    gone: tuple[Any, ...] = (
        ray.exceptions.ActorDiedError,
        ray.exceptions.ActorUnavailableError,
        ray.exceptions.WorkerCrashedError,
    )
    gone += (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError, ray.exceptions.RayActorError)
    lost = 0

    def start() -> None:
        actor = make.remote(kept, job, threads or cpus)
        waiting[actor.ready.remote()] = actor

    try:
        for _ in range(min(max(1, _slots(ray, cpus, gpus)), len(todo))):
            start()
        while left or running:
            for actor in sorted(load, key=lambda a: load[a]):
                while left and load[actor] < _PER_ACTOR:
                    shard = left.popleft()
                    running[actor.run.remote(shard)] = (actor, shard)
                    load[actor] += 1
            finished, _ = ray.wait([*running, *waiting], num_returns=1, timeout=60)
            if not finished and not load:
                bar.say(f"waiting for Ray to start a worker with {cpus} CPUs and {gpus} GPUs")
            for ref in finished:
                try:
                    value = ray.get(ref)
                except gone:
                    died = ref in waiting
                    if died:
                        actor = waiting.pop(ref)
                    else:
                        actor, shard = running.pop(ref)
                        left.appendleft(shard)
                    if load.pop(actor, None) is not None or died:
                        lost += 1
                        if lost > len(todo) + 100:
                            raise BackfillError(f"ray: {lost} workers were lost; giving up") from None
                        bar.say("a worker was lost; its shards run again")
                        start()
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, Exception) else error) from None
                if ref in waiting:
                    load[waiting.pop(ref)] = 0
                    continue
                actor, shard = running.pop(ref)
                if actor in load:
                    load[actor] -= 1
                bar.advance(shard.rows)
                yield value
    except (KeyboardInterrupt, GeneratorExit):
        if running:  # their workers mark them; a second Ctrl-C ends the wait
            what = "shard" if len(running) == 1 else "shards"
            _log.warning("finishing %d %s, press Ctrl-C again to leave them", len(running), what)
            ray.wait(list(running), num_returns=len(running))
        raise
    finally:
        for actor in (*load, *waiting.values()):
            ray.kill(actor)
        if started:
            ray.shutdown()


def _slots(ray: Any, cpus: int, gpus: int) -> int:
    """How many workers fit on the nodes that are there now."""
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            fits = int(have.get("CPU", 0)) // cpus
            total += min(fits, int(have.get("GPU", 0)) // gpus) if gpus else fits
    return total
