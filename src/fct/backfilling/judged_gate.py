"""The quality gate on queries of your own: rows of the old gallery, mapped as the job will map them, and judged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fct.artifact.transformation import Transformation
from fct.backfilling.choosing import expected_choice
from fct.backfilling.quality import Quality, Writing, before_and_after, check_quality, held_out_pairs
from fct.backfilling.resolve import Context
from fct.backfilling.true_source import named_ids, row_ids
from fct.checks import shown
from fct.errors import QualityGateError
from fct.gallery.array_argument import load_labels
from fct.gallery.beside_rows import load_ids
from fct.gallery.named_pairs import load_pairs
from fct.gallery.stores import Opening, open_source, opening
from fct.judging.judgements import Judgements, read_qrels
from fct.judging.upgrade_systems import UpgradeQueries, judge_upgrade
from fct.judging.upgrade_verdict import UpgradeVerdict
from fct.options.groups import BackfillOptions, Gate, PlanOptions, StoreAccess
from fct.rows import rows_of
from fct.types import JsonDict

__all__ = ["GateVerdict", "Gates", "JudgedQueries", "check_judged", "judged_queries", "load_judgements"]

Floats: TypeAlias = npt.NDArray[np.float32]
_MOST_ROWS = 100_000
_MOST_BYTES = 1 << 30  # of their vectors
_TABLES = (".parquet", ".arrow", ".feather", ".ipc", ".lance")


@dataclass(frozen=True)
class JudgedQueries:
    """What a gate asks, and what answers it."""

    queries: UpgradeQueries
    judgements: Judgements


@dataclass(frozen=True)
class GateVerdict:
    """What the queries said.

    verdict: as :func:`fct.judge_upgrade` has it, without the ceiling, since nobody has the gallery's true vectors yet.
    rows: of the gallery that were searched: every judged one, and others by lot. of: how many it has.
    rejected: of those, rows that h cannot map; they are left out on both sides. refusals: which limits it misses.
    reembedded: of the rows searched, those that stood as the true vectors that a partial backfill will give them: of
    pairs all that it will choose; a function is not asked by a gate, so its rows are judged as mapped ones.
    """

    verdict: UpgradeVerdict
    rows: int
    of: int
    rejected: int
    refusals: tuple[str, ...]
    reembedded: int = 0


@dataclass(frozen=True)
class Gates:
    """What is asked before a row is written: held-out pairs, queries of one's own, both, or nothing."""

    limits: Gate
    h: Transformation
    pairs: JsonDict | None
    queries: JudgedQueries | None

    @classmethod
    def of(cls, options: PlanOptions | BackfillOptions, h: Transformation) -> Gates:
        """Looks at pairs and queries before anything else is opened; raises as :func:`held_out_pairs` and
        :func:`judged_queries` do."""
        gate = options.gate
        return cls(gate, h, held_out_pairs(gate, h), judged_queries(gate, h, options.access))

    def quality(self, writing: Writing) -> Quality | None:
        return check_quality(self.h, self.limits, self.pairs, writing)

    def judged(self, context: Context, writing: Writing) -> GateVerdict | None:
        return check_judged(context, self.limits, self.queries, writing)

    def require(self, context: Context, threads: int | None) -> GateVerdict | None:
        """What the queries say; raises QualityGateError with every limit that is missed."""
        writing = Writing.of_job(context.job, context.device, threads)
        quality, judged = self.quality(writing), self.judged(context, writing)
        refusals = [why for gate in (quality, judged) if gate is not None for why in gate.refusals]
        if refusals:
            raise QualityGateError("; ".join(refusals))
        return judged


def judged_queries(gate: Gate, h: Transformation, access: StoreAccess) -> JudgedQueries | None:
    """The gate's queries and judgements, looked at before anything else is opened; None where there are none.

    Raises:
        ValueError: one without the other, a limit without both, arrays that do not fit h.
    """
    if gate.queries is None and gate.qrels is None:
        for name in ("min_ndcg", "min_query_recall"):
            if getattr(gate, name) is not None:
                raise ValueError(f"queries: expected queries and qrels to check {name} on, got None")
        for name, idle in (("ndcg_margin", 0.0), ("allow_inconclusive", False)):
            if getattr(gate, name) != idle:
                raise ValueError(f"{name}: expected queries and qrels beside it, got none")
        return None
    for name in ("queries", "qrels"):
        if getattr(gate, name) is None:
            raise ValueError(f"{name}: expected them beside {'qrels' if name == 'queries' else 'queries'}, got None")
    how = opening(access)
    return JudgedQueries(_queries(gate.queries, h, how), load_judgements(gate.qrels, how))


def _queries(given: object, h: Transformation, access: Opening) -> UpgradeQueries:
    found = given if isinstance(given, UpgradeQueries) else _columns(given, access)
    if not isinstance(found, UpgradeQueries):
        missing = [name for name in ("id", "old", "new") if name not in found]
        if missing:
            raise ValueError(f"queries: expected id, old and new, got {', '.join(sorted(found)) or 'none'}")
        ids = found["id"]
        found = UpgradeQueries(ids.to_pylist() if isinstance(ids, pa.Array) else list(ids), found["old"], found["new"])
    for name, d in (("old", h.d_old), ("new", h.d_new)):
        rows_of(getattr(found, name), f"queries: {name}", d=d, d_why="to match the transformation")
    return found


def _columns(given: object, access: Opening) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"queries: expected a mapping of id, old and new, or the path of a table, got {shown(given)}")
    found = load_pairs(given, name="queries", **access)
    if "id" not in found and not os.fspath(given).endswith(".npz"):
        ids = load_ids(open_source(given, **access, name="queries"), name="queries")
        found = found if ids is None else found | {"id": ids}
    return found


def load_judgements(given: object, access: Opening, *, name: str = "qrels") -> Judgements:
    """Judgements from a file of TREC or BEIR, a table with columns query, item and grade, or a mapping of them.

    Raises:
        ValueError, FctError: no such columns, or judgements that contradict each other. FileNotFoundError: no file.
    """
    if isinstance(given, Judgements):
        return given
    if isinstance(given, Mapping):
        missing = [column for column in ("query", "item", "grade") if column not in given]
        if missing:
            there = ", ".join(sorted(map(str, given))) or "none"
            raise ValueError(f"{name}: expected query, item and grade, got {there}")
        return Judgements.of(given["query"], given["item"], given["grade"])
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"{name}: expected a file, a mapping of query, item and grade, or Judgements, got {shown(given)}"
        )
    where = os.fspath(given)
    if not where.endswith(_TABLES) and not os.path.isdir(where):
        return read_qrels(PurePath(where))
    source = open_source(where, **access, name=name)
    columns = [load_labels(source, name=name, column=column) for column in ("query", "item", "grade")]
    return Judgements.of(*(column.tolist() for column in columns))


def check_judged(context: Context, gate: Gate, asked: JudgedQueries | None, writing: Writing) -> GateVerdict | None:
    """Searches rows of the gallery, old and as the job will store them, and compares with the limits.

    A gate that was asked for and cannot decide refuses: inconclusive passes with ``allow_inconclusive`` alone.

    Raises:
        ValueError: ids of the judgements that are not the gallery's, or none that counts.
    """
    if asked is None:
        return None
    items = _gallery_rows(context, asked, writing)
    verdict = judge_upgrade(
        asked.queries,
        asked.judgements,
        items.ids,
        np.concatenate(items.old),
        np.concatenate(items.new),
        old_metric=context.job.old_space.metric,
        new_metric=context.job.new_space.metric,
        fused=False,
        margin=gate.ndcg_margin,
    )
    refusals = tuple(f"quality gate: {why}" for why in _missed(gate, verdict))
    return GateVerdict(verdict, len(items.ids), context.job.rows, items.rejected, refusals, items.reembedded)


def _missed(gate: Gate, verdict: UpgradeVerdict) -> list[str]:
    missed = []
    if verdict.word == "no-go":
        missed.append(f"no-go: {verdict.reason}")
    if verdict.word == "inconclusive" and not gate.allow_inconclusive:
        missed.append(f"inconclusive (allow_inconclusive, --allow-inconclusive, goes on): {verdict.reason}")
    measures = verdict.result("mapped").measures
    limits = (("ndcg", f"nDCG@{measures.k}", gate.min_ndcg), ("recall", f"recall@{measures.k}", gate.min_query_recall))
    for name, words, least in limits:
        if least is not None and not (value := measures.mean(name)) >= least:
            missed.append(f"{words} of the mapped rows is {value:.3f} on {verdict.queries} queries, below {least}")
    return missed


@dataclass
class _Items:
    """Rows of the gallery: their ids, and their vectors in the old space and as they will be in the new one."""

    ids: list[str] = field(default_factory=list)
    old: list[Floats] = field(default_factory=list)
    new: list[Floats] = field(default_factory=list)
    rejected: int = 0
    reembedded: int = 0


class _TrueRows:
    """The true vectors of pairs in the place of mapped rows, where a partial backfill will write them."""

    def __init__(self, context: Context) -> None:
        how = context.reembedding
        self.pairs = None if how is None else how.pairs
        self.dtype = context.job.dtype
        self.chosen = None if self.pairs is None else expected_choice(context)

    def put(self, new: Floats, ids: list[Any], numbers: npt.NDArray[np.int64]) -> int:
        """Replaces rows of ``new`` (as they will be stored); how many. numbers: of the rows, in the gallery."""
        if self.pairs is None or self.chosen is None:
            return 0
        places = self.pairs.places(ids)
        there = (places >= 0) & self.chosen[numbers]
        new[there] = np.asarray(self.pairs.vectors)[places[there]].astype(self.dtype)
        return int(there.sum())


def _gallery_rows(context: Context, asked: JudgedQueries, writing: Writing) -> _Items:
    job, items = context.job, _Items()
    judged = {item for query in asked.judgements.queries for item in asked.judgements.grades[query]}
    most = min(_MOST_ROWS, max(1000, _MOST_BYTES // (4 * (job.old_space.dim + job.new_space.dim))))
    lot = np.ones(job.rows, bool) if job.rows <= most else _drawn(job.rows, most)
    mapper, reader = context.mapper(job, threads=writing.threads), context.reader(job)
    known: set[str] = set()
    true = _TrueRows(context)
    for shard in job.shards:
        at = shard.first
        for batch, side in reader.batches(shard):
            own = row_ids(batch, job.id_column, at)
            ids = [str(one) for one in own]
            known.update(judged.intersection(ids))
            wanted = lot[at : at + len(ids)] | np.fromiter((one in judged for one in ids), bool, len(ids))
            rows, first = np.flatnonzero(wanted), at
            at += len(ids)
            if not len(rows):
                continue
            taken = pa.array(rows)
            old, new, kept = before_and_after(mapper, batch.take(taken), None if side is None else side.take(taken))
            items.reembedded += true.put(new, [own[row] for row in rows[kept].tolist()], first + rows[kept])
            items.ids += [ids[row] for row in rows[kept].tolist()]
            items.old.append(old)
            items.new.append(new)
            items.rejected += len(rows) - len(kept)
    if not known:
        where = f"the column {job.id_column!r}" if job.id_column else "the rows' numbers, since there is no id column"
        raise ValueError(
            f"qrels: expected items by their ids in the source ({where}), none of {len(judged):,} judged items is in "
            f"{job.source} ({named_ids(sorted(judged))})"
        )
    return items


def _drawn(rows: int, most: int) -> npt.NDArray[np.bool_]:
    out = np.zeros(rows, bool)
    out[np.random.default_rng(0).choice(rows, most, replace=False, shuffle=False)] = True
    return out
