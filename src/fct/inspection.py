"""fct.inspect_gallery: what is wrong with stored vectors, found before anything is fitted or mapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from fct.checks import check_choice, check_seed, check_text, check_whole
from fct.errors import FctError
from fct.gallery import Source, open_source
from fct.gallery.columns import VECTOR_NAMES, pick_column
from fct.gallery.location import RetryPolicy
from fct.gallery.vectors import vector_block, vector_dim
from fct.progress import step_bar
from fct.search import topk
from fct.types import FileSystem, GalleryLike, StorageOptions

__all__ = ["GalleryInspection", "ModelGroups", "inspect_gallery", "model_groups"]

Floats = npt.NDArray[np.float32]
_BATCH = 16_384
_HASHED_ROWS = 50_000_000  # 8 bytes each
_UNIT = 1e-3
_LEAST_SHARE = 0.02  # of a group that is worth a word
_LINKED = (
    0.02  # neighbours that two clusters have in each other, a row of the smaller, from which on they are one group
)
_SHARED = 0.5  # of the variance that one group's main directions explain of the other, over what they explain of itself


@dataclass(frozen=True, slots=True)
class ModelGroups:
    """Two groups of rows that hardly are each other's neighbours and vary in other directions: two models, most likely.

    share: of the smaller group. crossing: share of ten nearest neighbours that lie in the other group. explained: how
    much of one group's variance the other's main directions explain, over what they explain of their own (1 for one
    model). first_rows: row numbers of some of the smaller group.
    """

    share: float
    crossing: float
    explained: float
    first_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GalleryInspection:
    """What :func:`inspect_gallery` found.

    rows: all of them. bad: rows that a backfill would set aside, by reason. zero: rows of zeros.
    duplicates: rows that repeat an earlier one exactly; None where the gallery is too large to tell.
    unit_share: rows of unit length, of the sound ones. norms: length at 0, 1, 50, 99 and 100 % of the sampled rows.
    constant: dimensions in which all sampled rows agree. codes: whether all values are whole numbers of one byte.
    groups: two models in one column, or None. findings: what to look at, a sentence each; empty when all is well.
    """

    source: str
    column: str
    dim: int
    rows: int
    bad: Mapping[str, int]
    zero: int
    duplicates: int | None
    unit_share: float
    norms: tuple[float, ...]
    constant: tuple[int, ...]
    codes: bool
    sampled: int
    groups: ModelGroups | None
    space: str | None
    findings: tuple[str, ...]


@dataclass
class _Tally:
    """What is counted while the rows pass by, and a sample of them spread evenly over the gallery."""

    sample_rows: int
    total: int
    rows: int = 0
    sound: int = 0
    zero: int = 0
    unit: int = 0
    codes: bool = True
    bad: Counter[str] = field(default_factory=Counter)
    hashes: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    sample: list[Floats] = field(default_factory=list)
    numbers: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def add(self, values: Floats, rows: npt.NDArray[np.int64], multipliers: npt.NDArray[np.uint64]) -> None:
        finite = np.isfinite(values).all(axis=1)
        self.bad["not finite"] += int((~finite).sum())
        values, rows = values[finite], rows[finite]
        norms = np.linalg.norm(values.astype(np.float64), axis=1)
        self.sound += len(values)
        self.zero += int((norms == 0).sum())
        self.unit += int((np.abs(norms - 1) < _UNIT).sum())
        self.codes = self.codes and _are_codes(values)
        if self.total <= _HASHED_ROWS:
            words = (values + np.float32(0)).view(np.uint32)  # -0.0 is 0.0
            self.hashes.append((words.astype(np.uint64) * multipliers).sum(axis=1, dtype=np.uint64))
        step = max(1, self.total // self.sample_rows)
        taken = rows % step == 0
        self.sample.append(values[taken])
        self.numbers.append(rows[taken])

    @property
    def duplicates(self) -> int | None:
        if self.total > _HASHED_ROWS:
            return None
        hashes = np.concatenate(self.hashes) if self.hashes else np.empty(0, np.uint64)
        return int(len(hashes) - len(np.unique(hashes)))


def _are_codes(values: Floats) -> bool:
    if not len(values):
        return True
    low, high = values.min(), values.max()
    return bool(low >= -128 and high <= 255 and high - low <= 255 and (values == np.rint(values)).all())


def inspect_gallery(
    source: GalleryLike,
    *,
    vector_column: str = "auto",
    binary_dtype: str = "float32",
    sample_rows: int = 4096,
    seed: int = 0,
    filesystem: FileSystem | None = None,
    storage_options: StorageOptions | None = None,
    retries: int = 6,
    timeout: float = 60.0,
    progress: bool = True,
) -> GalleryInspection:
    """Reads a gallery once and says what is wrong with its vectors, before a model is blamed for it.

    Args:
        source: a gallery, as :func:`fct.plan_backfill` takes it.
        vector_column: of the vectors; "auto": as a backfill finds it. binary_dtype: what a binary column holds.
        sample_rows: how many rows are kept for the lengths, the constant dimensions and the search for two models.
        seed: of the search for two models. filesystem, storage_options, retries, timeout: of the source, as
            :func:`fct.plan_backfill` has them.
        progress: show a bar on stderr.

    Returns:
        GalleryInspection. Nothing is written. Two models are found where the smaller one has some per cent of the rows,
        and its rows are their own neighbours; that none were found is no proof.

    Raises:
        ValueError: no such column. FctError: a file that cannot be read, or not one whole vector in it.

    Examples:
        >>> import numpy as np, tempfile, fct
        >>> folder = tempfile.mkdtemp()
        >>> rows = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
        >>> rows[7] = 0
        >>> np.save(folder + "/a.npy", rows)
        >>> fct.inspect_gallery(folder, progress=False).zero
        1
    """
    check_text(vector_column, "vector_column", "the name of a column")
    check_choice(binary_dtype, "binary_dtype", ("float32", "float16"))
    check_whole(sample_rows, "sample_rows", 16)
    check_seed(seed)
    gallery = open_source(
        source, filesystem=filesystem, storage_options=storage_options, retry_policy=RetryPolicy(retries, timeout)
    )
    column = pick_column(gallery.schema, vector_column, VECTOR_NAMES, "vector_column")
    tally, dim = _counted(gallery, column, binary_dtype, sample_rows, progress)
    sample = np.concatenate(tally.sample)[: 2 * sample_rows]
    numbers = np.concatenate(tally.numbers)[: 2 * sample_rows]
    norms = np.linalg.norm(sample.astype(np.float64), axis=1)
    found = GalleryInspection(
        source=gallery.url,
        column=column,
        dim=dim,
        rows=tally.rows,
        bad={reason: count for reason, count in tally.bad.items() if count},
        zero=tally.zero,
        duplicates=tally.duplicates,
        unit_share=tally.unit / tally.sound,
        norms=tuple(float(q) for q in np.quantile(norms, [0, 0.01, 0.5, 0.99, 1])),
        constant=tuple(np.flatnonzero(np.ptp(sample, axis=0) == 0).tolist()) if len(sample) > 1 else (),
        codes=tally.codes,
        sampled=len(sample),
        groups=model_groups(sample, numbers, seed=seed),
        space=str(gallery.space) if gallery.space is not None else None,
        findings=(),
    )
    return _with_findings(found)


def _counted(gallery: Source, column: str, binary_dtype: str, sample_rows: int, progress: bool) -> tuple[_Tally, int]:
    pieces = gallery.pieces()
    tally = _Tally(sample_rows, sum(piece.rows for piece in pieces))
    dim, multipliers = 0, np.empty(0, np.uint64)
    with step_bar(progress) as bar:
        task = bar.add_task("reading the gallery", total=tally.total)
        for piece in pieces:
            for batch in gallery.read(piece, 0, piece.rows, _BATCH):
                values = batch.column(column)
                if not dim:
                    dim = vector_dim(values, binary_dtype) or 0
                    odd = np.random.default_rng(0).integers(1, 2**63, size=dim, dtype=np.uint64)
                    multipliers = odd | np.uint64(1)
                if dim:
                    block = vector_block(values, dim, binary_dtype)
                    rows = np.arange(len(values)) if block.rows is None else block.rows
                    tally.bad.update(Counter(block.bad.values()))
                    whole = np.ascontiguousarray(block.values, dtype=np.float32)
                    tally.add(whole, rows.astype(np.int64) + tally.rows, multipliers)
                else:
                    tally.bad["null"] += len(values)
                tally.rows += batch.num_rows
                bar.update(task, completed=tally.rows)
    if not tally.sound:
        raise FctError(f"source: expected at least one whole vector in column {column!r}, {gallery.url} has none")
    return tally, dim


def model_groups(sample: Floats, numbers: npt.NDArray[np.int64], *, seed: int = 0) -> ModelGroups | None:
    """Whether the rows look like those of two models: two groups without neighbours in each other, in other directions.

    Classes and topics make groups as well, but their rows vary in directions that they share. One model's vectors are
    an unknown rotation to the other, so that the main directions of one group say nothing of the other.

    Args:
        sample: (n, d) float32, finite. numbers: (n,) their row numbers.

    Returns:
        ModelGroups, or None where the rows look like one model's, or are too few to tell (200).
    """
    norms = np.linalg.norm(sample, axis=1)
    keep = norms > 0
    rows, numbers = sample[keep] / norms[keep, None], numbers[keep]
    rows, first = np.unique(rows, axis=0, return_index=True)  # copies are neighbours whatever made them
    numbers = numbers[first]
    if len(rows) < 200 or rows.shape[1] < 4:
        return None
    near = np.asarray(topk(rows, rows, 10, metric="ip", same_items=True, progress=False).indices)
    label = _clusters(rows, seed)
    count = int(label.max()) + 1
    edges = np.zeros((count, count))
    np.add.at(edges, (np.repeat(label, near.shape[1]), label[near].ravel()), 1)
    sizes = np.bincount(label, minlength=count).astype(np.float64)
    apart = (edges + edges.T) / near.shape[1] / np.minimum.outer(sizes, sizes) < _LINKED
    part = _joined(count, lambda a, b: not apart[a, b])[label]  # groups without neighbours in each other
    parts = [rows[part == i] for i in range(part.max() + 1)]
    large = [i for i, members in enumerate(parts) if len(members) >= max(30, _LEAST_SHARE * len(rows))]
    if len(large) < 2:
        return None
    alike = np.ones((len(large), len(large)))
    for a, i in enumerate(large):
        for b, j in enumerate(large):
            alike[a, b] = 1.0 if a == b else _explained(parts[i], parts[j], seed)
    model = _joined(len(large), lambda a, b: max(alike[a, b], alike[b, a]) >= _SHARED)
    if model.max() == 0:
        return None
    shares = [sum(len(parts[large[i]]) for i in np.flatnonzero(model == m)) for m in range(model.max() + 1)]
    small = int(np.argmin(shares))
    inside = np.isin(part, [large[i] for i in np.flatnonzero(model == small)])
    return ModelGroups(
        share=float(inside.mean()),
        crossing=float((inside[near] != inside[:, None]).mean()),
        explained=float(alike[np.ix_(model == small, model != small)].max()),
        first_rows=tuple(np.sort(numbers[inside])[:5].tolist()),
    )


def _clusters(rows: Floats, seed: int) -> npt.NDArray[np.int64]:
    """Spherical k-means; some tens of clusters, each with at least a row."""
    rng = np.random.default_rng(seed)
    centres = rows[rng.choice(len(rows), min(64, len(rows) // 40), replace=False)]
    label = np.zeros(len(rows), np.int64)
    for _ in range(15):
        label = np.argmax(rows @ centres.T, axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, label, rows)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def _joined(count: int, linked: Callable[[int, int], bool]) -> npt.NDArray[np.int64]:
    """The connected component of each of ``count`` things."""
    label = np.arange(count)
    for a in range(count):
        for b in range(a):
            if label[a] != label[b] and linked(a, b):
                label[label == label[a]] = label[b]
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def _explained(rows: Floats, others: Floats, seed: int) -> float:
    """What the main directions of half of ``rows`` explain of ``others``, over what they explain of the other half."""
    order = np.random.default_rng(seed).permutation(len(rows))
    half, rest = rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]
    _, _, axes = np.linalg.svd(half - half.mean(axis=0), full_matrices=False)
    axes = axes[: max(2, min(32, rows.shape[1] // 8))]

    def share(part: Floats) -> float:
        centred = part - part.mean(axis=0)
        return float(((centred @ axes.T) ** 2).sum() / max(float((centred**2).sum()), 1e-30))

    return share(others) / max(share(rest), 1e-12)


def _with_findings(found: GalleryInspection) -> GalleryInspection:
    say: list[str] = []
    if found.bad:
        worst = sorted(found.bad.items(), key=lambda item: -item[1])[:5]
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in worst)
        say.append(
            f"{sum(found.bad.values()):,} of {found.rows:,} rows hold no usable vector ({reasons}); a backfill sets "
            "them aside"
        )
    if found.zero:
        say.append(f"{found.zero:,} rows are zero: items that could not be embedded?")
    if found.duplicates:
        say.append(
            f"{found.duplicates:,} rows repeat an earlier one exactly: copies of an item, or of a fallback vector; "
            "leave them out of the pairs"
        )
    say += _of_lengths(found)
    if found.codes:
        say.append(
            "all values are whole numbers of one byte: codes of 8-bit vectors? They need their scale, and their "
            "offset where there is one"
        )
    if found.constant:
        some = ", ".join(map(str, found.constant[:5])) + (", ..." if len(found.constant) > 5 else "")
        say.append(f"{len(found.constant)} dimensions never change ({some}): padded vectors?")
    if found.groups is not None:
        g = found.groups
        say.append(
            f"two models in one column, most likely: {100 * g.share:.0f} % of the rows (rows "
            f"{', '.join(map(str, g.first_rows))}, ...) have {100 * g.crossing:.1f} % of their neighbours among the "
            "others and vary in other directions"
        )
    if found.space is None:
        say.append("the gallery does not say which model made its vectors; write it down with fct.gallery.tag_space")
    return replace(found, findings=tuple(say))


def _of_lengths(found: GalleryInspection) -> list[str]:
    if 0.01 < found.unit_share < 0.99:
        return [
            f"{100 * found.unit_share:.0f} % of the rows have unit length and the others do not: two ways of storing, "
            "or two models, in one column"
        ]
    low, high = found.norms[1], found.norms[3]
    if found.unit_share <= 0.01 and low > 0 and high > 100 * low:
        return [f"lengths run from {low:.3g} to {high:.3g}: more than one scale in one column"]
    return []
