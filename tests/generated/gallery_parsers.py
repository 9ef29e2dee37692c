"""Galleries as damaged or hostile input: a backfill's own journal, and the logs and states of other tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

import fct
import tests.backfilling.jobs_of_0_1 as of_0_1

# What the jobs share lies in parsers, which imports this file last.
import tests.generated.parsers as common
from fct.backfilling.run import backfill
from fct.gallery.vectors import vector_array

__all__ = ["GALLERY_JOBS"]


def old_gallery(folder: Path) -> None:
    """Two Parquet files of the same number of rows, one bad row in each."""
    rows = common.numbers(rows=32)
    rows[[5, 20], 0] = np.nan
    folder.mkdir(parents=True)
    for i, name in enumerate(("a", "b")):
        part = rows[16 * i : 16 * (i + 1)]
        table = pa.table(
            {
                "id": [f"i{16 * i + j}" for j in range(16)],
                "old": vector_array(part),
                "tag": list(range(16 * i, 16 * i + 16)),
            }
        )
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=8)


def content(folder: Path) -> Any:
    """The rows of a new gallery, file by file."""
    return [(f.name, pq.read_table(f).to_pylist()) for f in sorted(folder.glob("*.parquet"))]


class _Journal(common.Job):
    """whole/old and whole/new, where some markers and files are missing where a run was stopped."""

    stopped = True

    def make(self, folder: Path) -> None:
        whole = folder / "whole"
        old_gallery(whole / "old")
        backfill(whole / "old", whole / "new", common.transformation(), old_model="random-old", **common.QUICK)
        shutil.copytree(whole / "new", folder / "want")
        if self.stopped:
            for number in (1, 3):
                (whole / f"new/_fct/done/{number:08d}.json").unlink()
                (whole / f"new/part-{number:08d}.parquet").unlink()
            (whole / "new/_fct/manifest.json").unlink()


class JournalResumed(_Journal):
    """A run that goes on ends with the right rows, or is refused."""

    files = ("new/_fct/*.json", "new/_fct/done/*.json", "new/_fct/rejects/*", "new/_fct/space.json")

    def use(self, folder: Path, changed: Path) -> str:
        new = folder / "new"
        report = backfill(folder / "old", new, common.transformation(), old_model="random-old", **common.QUICK)
        if content(new) != content(folder.parent / "want") or report.rows_out != 30:
            raise common.Wrong(f"{changed.name}: other rows, and no word of it")
        verified = fct.verify_gallery(new, source=str(folder / "old"))
        if not verified.proven:
            raise common.Wrong(f"{changed.name}: mended, and verify says {verified.problems or verified.unproven}")
        return "resumed"


class JournalFinished(JournalResumed):
    """The same of a backfill that is finished, its files of rows damaged as well."""

    stopped = False
    files = (*JournalResumed.files, "new/*.parquet", "new/_fct/transformation.safetensors")  # type: ignore[assignment]  # more of them


class JournalVerified(_Journal):
    """verify says of every damaged byte that counts that it is damaged."""

    stopped = False
    files = JournalFinished.files

    def use(self, folder: Path, changed: Path) -> str:
        new = folder / "new"
        report = fct.verify_gallery(new, source=str(folder / "old"), spot_check=8)
        if report.ok and content(new) != content(folder.parent / "want"):
            raise common.Wrong(f"{changed.name}: verify says ok of other rows")
        if report.ok and changed.suffix == ".parquet":
            raise common.Wrong(f"{changed.name}: verify says ok of a changed file")
        if report.rows_out + report.rejects != report.rows_in:
            raise common.Wrong("a sum that is none")
        return "ok" if report.ok else "reported"


class JournalOf01(common.Job):
    """A job that version 0.1 began, which had no checksum, stopped half way."""

    files = ("new/_fct/job.json", "new/_fct/done/*.json")

    def make(self, folder: Path) -> None:
        whole = folder / "whole"
        (whole / "old").mkdir(parents=True)
        np.save(whole / "old/a.npy", of_0_1.numbers(of_0_1.D_OLD, 0))
        shutil.copytree(of_0_1.HERE / "half", whole / "new")
        shutil.copytree(whole, folder / "want")
        self.finish(folder / "want")

    @staticmethod
    def finish(folder: Path) -> Any:
        h = of_0_1.transformation(side_info=False)
        return backfill(
            str(folder / "old"),
            str(folder / "new"),
            h,
            old_model="random-old",
            precision="fp32",
            progress=False,
            threads=1,
        )

    def use(self, folder: Path, changed: Path) -> str:
        self.finish(folder)
        for file in (folder.parent / "want/new").glob("*.npy"):
            if not np.array_equal(np.load(file), np.load(folder / "new" / file.name)):
                raise common.Wrong(f"{changed.name}: other rows, and no word of it")
        if len(list((folder / "new").glob("*.npy"))) != of_0_1.ROWS // of_0_1.SHARD_ROWS:
            raise common.Wrong("rows too many")
        return "resumed"


class Exported(common.Job):
    """What stands beside a gallery of bare matrices, and what an export makes of it."""

    files = ("new/_fct/*.json", "new/_fct/done/*.json", "new/_rows/*", "new/*.npy")

    def make(self, folder: Path) -> None:
        whole = folder / "whole"
        old_gallery(whole / "old")
        backfill(
            whole / "old", whole / "new", common.transformation(), old_model="random-old", format="npy", **common.QUICK
        )
        shutil.copytree(whole, folder / "want")

    def use(self, folder: Path, changed: Path) -> str:
        from fct.gallery import export_bulk

        export_bulk(str(folder / "new"), folder / "out", "qdrant", id_column="tag", progress=False, columns=["id"])
        return "exported"


class SavedDataset(common.Job):
    """What Hugging Face datasets saved; its JSON alone is damaged."""

    files = ("*.json",)

    def make(self, folder: Path) -> None:
        whole = folder / "whole"
        whole.mkdir()
        table = pa.table({"id": list(range(40)), "old": vector_array(common.numbers())})
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        for i, name in enumerate(names):
            with pa.ipc.new_stream(str(whole / name), table.schema) as writer:
                writer.write_table(table.slice(20 * i, 20))
        state: dict[str, Any] = {
            "_data_files": [{"filename": n} for n in names], "_fingerprint": "x", "_format_columns": None,
            "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": "train",
        }  # fmt: skip
        (whole / "state.json").write_text(json.dumps(state))
        (whole / "dataset_info.json").write_text("{}")

    def use(self, folder: Path, changed: Path) -> str:
        found = common.table_of(folder)["id"].to_pylist()
        named = [e["filename"] for e in json.loads((folder / "state.json").read_text())["_data_files"]]
        want = [i for n in named for i in range(20 * int(n[9]), 20 * int(n[9]) + 20)]
        if found != want:
            raise common.Wrong("other rows than the state's")
        return "loaded"


class Delta(common.Job):
    """A Delta table's log."""

    memory = 8 << 30  # address space of its threads
    modules = ("deltalake",)
    files = ("_delta_log/*.json",)

    def make(self, folder: Path) -> None:
        from deltalake import DeltaTable, write_deltalake

        whole = folder / "whole"
        table = pa.table({"id": list(range(40)), "old": pa.array(common.numbers().tolist(), pa.list_(pa.float32()))})
        write_deltalake(str(whole), table.slice(0, 20))
        write_deltalake(str(whole), table.slice(20), mode="append")
        DeltaTable(str(whole)).delete("id = 7")

    def use(self, folder: Path, changed: Path) -> str:
        from deltalake import DeltaTable

        found = sorted(common.table_of(folder)["id"].to_pylist(), key=repr)
        try:
            want = pa.table(DeltaTable(str(folder)).to_pyarrow_table())["id"].to_pylist()
        except Exception:
            return "loaded, and not by deltalake's own reader"
        if found != sorted(want, key=repr):
            raise common.Wrong("other rows than deltalake's")
        return "loaded"


GALLERY_JOBS: dict[str, common.Job] = {
    "resumed": JournalResumed(),
    "finished": JournalFinished(),
    "verified": JournalVerified(),
    "of_0_1": JournalOf01(),
    "exported": Exported(),
    "dataset": SavedDataset(),
    "delta": Delta(),
}
