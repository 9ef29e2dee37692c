"""The backfill itself, as a part of a page: how far it is, how fast it was, what stopped it, and what was rejected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, TypeAlias

from fct.backfilling.timeline import DoneShard, Pause, Timeline
from fct.report.charts import Line, line_chart
from fct.report.csv_table import Cells, csv_table
from fct.report.escaped_text import escaped

__all__ = ["backfill_section", "backfill_sentence"]

Figures: TypeAlias = Mapping[str, Any]  # what JSON holds
_SHOWN = 30  # shards, files and reasons, of which there may be thousands
_POINTS = 240  # of a curve
_UNITS = ((2 * 86_400, 86_400, "days"), (2 * 3_600, 3_600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


def backfill_sentence(timeline: Timeline, verified: Figures | None) -> str:
    """Whether the gallery is whole, as the first line of a page."""
    job = timeline.job
    if verified is not None and not verified["ok"]:
        word, kind = "not whole", "no-go"
        said = f"fct verify found {_counted(len(verified['problems']), 'problem')}: {verified['problems'][0]}"
    elif timeline.finished:
        word, kind = "finished", "go"
        said = f"{job.rows:,} rows in = {job.rows - timeline.rejects:,} out + {timeline.rejects:,} rejected"
        said += {None: "; not verified here", True: "; verified", False: "; verified as far as it was checked"}[
            None if verified is None else bool(verified["proven"])
        ]
    else:
        word, kind = "unfinished", "open"
        left, about = job.rows - timeline.rows_done, timeline.seconds_left
        said = f"{timeline.rows_done:,} of {job.rows:,} rows are done ({_share(timeline.rows_done, job.rows)})"
        if left:
            said += f", {left:,} are left" + ("" if about is None else f", about {_duration(about)} at the rate so far")
        else:
            said += "; the last step, which counts them and commits the gallery, is left: run fct backfill again"
    return f'<p class="verdict {kind}"><b>{word}</b>: {escaped(said)}.</p>'


def backfill_section(timeline: Timeline, verified: Figures | None) -> list[str]:
    """Parts of a page."""
    parts = ["<h2>The backfill</h2>", csv_table(["what", "value"], _facts(timeline), "backfill.csv", kind="facts")]
    parts += [f'<p class="note"><strong>Note:</strong> {escaped(trouble)}.</p>' for trouble in timeline.troubles]
    return [
        *parts,
        *_progress(timeline),
        *_left(timeline),
        *_rejects(timeline),
        *_shards(timeline),
        *_verified(verified),
    ]


def _facts(timeline: Timeline) -> Cells:
    job, span, rate = timeline.job, timeline.span, timeline.rate
    backends = sorted({shard.backend for shard in timeline.shards}) or [job.backend]
    cells = [
        ["source", job.source],
        ["side-information", (f"{job.side}, joined by {job.side_join}" if job.side else job.side_column) or "none"],
        ["new gallery", job.destination],
        ["old space", str(job.old_space)],
        ["new space", str(job.new_space)],
        ["h", job.transformation],
        ["precision", f"{job.precision}, {' and '.join(backends)}"],
        ["rows are written as", f"{job.format}, {job.dtype}"],
        ["rows", f"{timeline.rows_done:,} of {job.rows:,} done"],
        ["shards", f"{len(timeline.shards):,} of {len(job.shards):,} done"],
        ["rejected", f"{timeline.rejects:,} rows"],
    ]
    if job.reembed:
        cells.append(["re-embedded", f"{timeline.true_rows:,} rows: {job.reembed}"])
    if span is not None:
        cells += [["began", _time(span[0])], ["last shard", _time(span[1])]]
        restarts = sum(pause.restarted for pause in timeline.pauses)
        cells.append(["stopped and started again", _counted(restarts, "time")])
    if rate is not None:
        cells.append(["rate", f"{rate:,.0f} rows/s while shards were under way"])
    return cells


def _progress(timeline: Timeline) -> list[str]:
    """The curve of rows over time, that of the rate, and the pauses."""
    span, timed = timeline.span, timeline.timed
    untimed = len(timeline.shards) - len(timed)
    parts = []
    if untimed:
        parts.append(
            f'<p class="note">{untimed:,} of {len(timeline.shards):,} shards do not say when they were made (an older '
            "version made them, or a clock was set back): the curve begins with them.</p>"
        )
    if span is None:
        return parts
    size, unit = _unit(span[1] - span[0])
    bands = [((pause.began - span[0]) / size, (pause.ended - span[0]) / size) for pause in timeline.pauses]
    ticks = _ticks((span[1] - span[0]) / size)
    points = _curve(timeline, span[0], size)
    said = (
        f"{points[-1][1]:.1f} % of the rows were done after {_duration(span[1] - span[0])}, with "
        f"{_counted(len(bands), 'pause')}"
    )
    parts.append(
        line_chart("Rows done over time", [Line("rows done", points, len(points), dots=len(points) <= 40)],
                   x_name=f"{unit} since it began", y_name="rows done %", top=100.0, ticks=ticks, bands=bands,
                   band_name="no shard was under way", said=said)
    )  # fmt: skip
    rates = _rates(timed, span[0], size)
    if len(rates) > 1:
        said = f"from {min(r[1] for r in rates):,.0f} to {max(r[1] for r in rates):,.0f} rows a second"
        parts.append(
            line_chart("Rows a second of a worker, shard by shard", [Line("rows/s", rates, len(rates), joined=False)],
                       x_name=f"{unit} since it began", y_name="rows/s", unit="rows/s", ticks=ticks, bands=bands,
                       band_name="no shard was under way", said=said)
        )  # fmt: skip
    return parts + _pauses(timeline.pauses)


def _curve(timeline: Timeline, began: float, size: float) -> list[tuple[float, float, float]]:
    """(time, % of rows done, 0) at the end of shards, of which no more are taken than can be seen."""
    done = sum(shard.rows for shard in timeline.shards if shard.ended is None)
    points = [(0.0, _percent(done, timeline), 0.0)]
    resumed = {pause.ended for pause in timeline.pauses}
    timed = timeline.timed
    step = -(-len(timed) // _POINTS)
    for place, shard in enumerate(timed, 1):
        assert shard.began is not None
        assert shard.ended is not None
        if shard.began in resumed:  # the curve is flat up to here
            points.append(((shard.began - began) / size, _percent(done, timeline), 0.0))
        done += shard.rows
        if place % step == 0 or place == len(timed):
            points.append(((shard.ended - began) / size, _percent(done, timeline), 0.0))
    return sorted(points)


def _percent(done: int, timeline: Timeline) -> float:
    return 100 * done / max(1, timeline.job.rows)


def _rates(timed: Sequence[DoneShard], began: float, size: float) -> list[tuple[float, float, float]]:
    """(time, rows a second, 0) of shards, or of runs of as many as there is no room for each of."""
    step = -(-len(timed) // _POINTS)
    found = []
    for at in range(0, len(timed), step):
        some = timed[at : at + step]
        seconds = sum(shard.seconds or 0.0 for shard in some)
        if seconds > 0:
            ended = max(shard.ended or 0.0 for shard in some)
            found.append(((ended - began) / size, sum(shard.rows for shard in some) / seconds, 0.0))
    return found


def _pauses(pauses: Sequence[Pause]) -> list[str]:
    if not pauses:
        return []
    cells = [
        [_time(p.began), _time(p.ended), f"{p.ended - p.began:,.1f}", "started again" if p.restarted else "waited"]
        for p in pauses
    ]
    return [
        "<h2>When nothing was under way</h2>",
        csv_table(["from (UTC)", "to", "seconds", "then"], cells, "pauses.csv", shown=_SHOWN),
        '<p class="note">Started again: none of the workers of before went on. What a stopped run had under way was '
        "done once more, and counts as pause.</p>",
    ]


def _left(timeline: Timeline) -> list[str]:
    if not timeline.left:
        return []
    cells = [[one.name, f"{one.rows:,}", f"{one.shards:,}"] for one in timeline.left]
    return [
        "<h2>What is left</h2>",
        csv_table(["file of the source", "rows", "shards"], cells, "left.csv", shown=_SHOWN),
        _more(len(cells), "files"),
    ]


def _rejects(timeline: Timeline) -> list[str]:
    if not timeline.rejects:
        return []
    cells = [[reason, f"{count:,}"] for reason, count in timeline.reasons.items()]
    return [
        "<h2>Rejected rows by reason</h2>",
        csv_table(["reason", "rows"], cells, "rejects.csv", shown=_SHOWN),
        _more(len(cells), "reasons"),
        '<p class="note">Which rows these are stands in the journal: rejects/, a line each.</p>',
    ]


def _shards(timeline: Timeline) -> list[str]:
    """Shard by shard, the slowest first; all of them in the CSV."""
    if not timeline.shards:
        return []

    def rate(shard: DoneShard) -> float | None:
        return shard.rows / shard.seconds if shard.seconds else None

    def slowest(shard: DoneShard) -> tuple[bool, float, int]:
        speed = rate(shard)
        return speed is None, speed or 0.0, shard.number

    cells = []
    for shard in sorted(timeline.shards, key=slowest):
        speed = rate(shard)
        cells.append(
            [
                str(shard.number), "–" if speed is None else f"{speed:,.0f}", f"{shard.rows:,}", f"{shard.rejects:,}",
                f"{shard.true_rows:,}" if timeline.job.reembed else "–",
                "–" if shard.began is None else _time(shard.began), "–" if shard.ended is None else _time(shard.ended),
                shard.file, shard.backend, shard.worker[:8] or "–",
            ]
        )  # fmt: skip
    heads = [
        *("shard", "rows/s", "rows", "rejected", "re-embedded", "began (UTC)", "ended", "file", "backend", "worker")
    ]
    return [
        "<h2>Shards, the slowest first</h2>",
        csv_table(heads, cells, "shards.csv", shown=_SHOWN),
        _more(len(cells), "shards"),
        '<p class="note">A worker reads one shard while it writes another: a shard\'s rate is its rows by the seconds '
        "since the worker's shard before it ended.</p>",
    ]


def _more(count: int, what: str) -> str:
    return f'<p class="note">{_SHOWN} of {count:,} {what} are shown, all are in the file.</p>' if count > _SHOWN else ""


def _verified(verified: Figures | None) -> list[str]:
    if verified is None:
        return []
    cells = [
        ["rows in", f"{int(verified['rows_in']):,}"],
        ["rows out", f"{int(verified['rows_out']):,}"],
        ["rejected", f"{int(verified['rejects']):,}"],
        ["rows of the source by another reader", _count(verified["source_rows"])],
        ["rows read alike by that reader", _count(verified["read_alike"])],
        ["rows compared with the source", _count(verified["compared"])],
        ["vectors compared with the reference", _count(verified["spot_checked"])],
        ["worst relative error", f"{float(verified['worst_error']):.2g}" if verified["spot_checked"] else "–"],
    ]
    word = "problems" if not verified["ok"] else "proven" if verified["proven"] else "ok as far as it was checked"
    parts = [
        f"<h2>What fct verify found: {word}</h2>",
        csv_table(["what", "value"], [cell for cell in cells if cell[1] != "–"], "verify.csv", kind="facts"),
    ]
    for head, key in (("problem", "problems"), ("note", "unproven")):
        parts += [f'<p class="note"><strong>{head}:</strong> {escaped(line)}</p>' for line in verified[key]]
    return parts


def _count(value: int | None) -> str:
    return f"{int(value):,}" if value else "–"


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _share(part: int, whole: int) -> str:
    """Never 100 % where something is left."""
    return f"{min(100 * part / max(1, whole), 99.9 if part < whole else 100):.1f} %"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _unit(seconds: float) -> tuple[float, str]:
    return next((size, name) for least, size, name in _UNITS if seconds >= least)


def _duration(seconds: float) -> str:
    size, name = _unit(seconds)
    return f"{seconds / size:,.{0 if seconds / size >= 20 else 1}f} {name}"


def _ticks(most: float) -> list[float]:
    """About five round numbers from 0 on."""
    if most <= 0:
        return [0.0]
    raw = most / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw)
    return [round(step * n, 10) for n in range(int(most / step + 1e-9) + 1)]
