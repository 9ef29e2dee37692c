"""The same shards on a Ray cluster: one actor per GPU or per n CPUs, shards handed out as actors come free.

The journal is what makes it exactly once: a shard whose worker died has no marker and is handed out again; a worker
that was only thought dead publishes the same bytes under the same names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from fct.backfilling.job import Job
from fct.backfilling.marker import Marker
from fct.backfilling.resolve import Context
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

    def __init__(self, context: Context, job: Job, threads: int) -> None:
        if context.journal.job() is None:
            raise BackfillError(
                f"journal: expected a folder that every node of the cluster sees, {context.journal.root} is not there "
                "on one: name a shared one with --journal (journal=), or leave the journal in the destination"
            )
        self._pipeline = context.pipeline(job, threads=threads)

    def ready(self) -> bool:
        return True

    def run(self, shard: Shard) -> Marker:
        return self._pipeline.submit(shard).result()


def check_ray(context: Context, cpus: int) -> None:
    """Raises, before anything is written, for what can never run on a cluster.

    Raises:
        MissingExtraError: no Ray. ValueError: no number of CPUs, or a function (reembed) that cannot be sent to a
        worker.
    """
    need("ray", "ray")
    if isinstance(cpus, bool) or not isinstance(cpus, int) or cpus < 1:
        raise ValueError(f"ray_cpus: expected a positive number, got {cpus!r}")
    if context.reembedding is not None and context.reembedding.ask is not None:
        pickler: Any = need("ray.cloudpickle", "ray")
        try:
            pickler.dumps(context.reembedding.ask)
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
    context: Context,
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
    gpus = 1 if context.device.startswith("cuda") else 0
    make: Any = ray.remote(_Worker).options(
        num_cpus=cpus, num_gpus=gpus, max_concurrency=_PER_ACTOR + 1, max_restarts=0, scheduling_strategy="SPREAD"
    )
    kept = ray.put(context)
    crew = _Crew(ray, lambda: make.remote(kept, job, threads or cpus), todo, bar)
    try:
        for _ in range(min(max(1, _slots(ray, cpus, gpus)), len(todo))):
            crew.start()
        while crew.left or crew.running:
            crew.hand_out()
            finished, _ = ray.wait([*crew.running, *crew.waiting], num_returns=1, timeout=60)
            if not finished and not crew.load:
                bar.say(f"waiting for Ray to start a worker with {cpus} CPUs and {gpus} GPUs")
            for ref in finished:
                marker = crew.settle(ref)
                if marker is not None:
                    yield marker
    except (KeyboardInterrupt, GeneratorExit):
        crew.finish()
        raise
    finally:
        crew.end()
        if started:
            ray.shutdown()


class _Crew:
    """The actors of a run, what each has under way, and the shards that are left."""

    def __init__(self, ray: Any, make: Callable[[], Any], todo: list[Shard], bar: Bar) -> None:
        self.left = deque(todo)
        self.waiting: dict[Any, Any] = {}  # an actor's ready() -> the actor
        self.running: dict[Any, tuple[Any, Shard]] = {}  # run() -> (actor, shard)
        self.load: dict[Any, int] = {}  # ready actors -> shards under way there
        self._ray, self._make, self._bar = ray, make, bar
        self._lost, self._most_lost = 0, len(todo) + 100
        names = "ActorDied ActorUnavailable WorkerCrashed NodeDied ObjectLost RayActor"
        self._gone = tuple(getattr(ray.exceptions, f"{name}Error") for name in names.split())

    def start(self) -> None:
        actor = self._make()
        self.waiting[actor.ready.remote()] = actor

    def hand_out(self) -> None:
        """Gives each actor what it can hold, those with the least to do first."""
        for actor in sorted(self.load, key=lambda a: self.load[a]):
            while self.left and self.load[actor] < _PER_ACTOR:
                shard = self.left.popleft()
                self.running[actor.run.remote(shard)] = (actor, shard)
                self.load[actor] += 1

    def settle(self, ref: Any) -> Marker | None:
        """The marker of a shard that is done; None where an actor is ready, or was lost and replaced."""
        try:
            value = self._ray.get(ref)
        except self._gone:
            self._replace(ref)
            return None
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        if ref in self.waiting:
            self.load[self.waiting.pop(ref)] = 0
            return None
        actor, shard = self.running.pop(ref)
        if actor in self.load:
            self.load[actor] -= 1
        self._bar.advance(shard.rows)
        marker: Marker = value
        return marker

    def _replace(self, ref: Any) -> None:
        """Puts the shards of a lost actor back. Another is started once for each that was lost."""
        died = ref in self.waiting
        if died:
            actor = self.waiting.pop(ref)
        else:
            actor, shard = self.running.pop(ref)
            self.left.appendleft(shard)
        if self.load.pop(actor, None) is not None or died:
            self._lost += 1
            if self._lost > self._most_lost:
                raise BackfillError(f"ray: {self._lost} workers were lost; giving up") from None
            self._bar.say("a worker was lost; its shards run again")
            self.start()

    def finish(self) -> None:
        """Waits for what is under way: the workers mark it. A second Ctrl-C ends the wait."""
        if self.running:
            what = "shard" if len(self.running) == 1 else "shards"
            _log.warning("finishing %d %s, press Ctrl-C again to leave them", len(self.running), what)
            self._ray.wait(list(self.running), num_returns=len(self.running))

    def end(self) -> None:
        for actor in (*self.load, *self.waiting.values()):
            self._ray.kill(actor)


def _slots(ray: Any, cpus: int, gpus: int) -> int:
    """How many workers fit on the nodes that are there now."""
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            fits = int(have.get("CPU", 0)) // cpus
            total += min(fits, int(have.get("GPU", 0)) // gpus) if gpus else fits
    return total
