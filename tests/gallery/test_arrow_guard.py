"""Arrow data that contradicts itself is refused before it is read, and libraries' own errors name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fct.errors import FctError
from fct.gallery import open_source
from fct.gallery.arrow_guard import validated

FLOATS = pa.array([1.0, 2, 3, 4], pa.float32())


def offsets(values: list[int]) -> Any:
    return pa.py_buffer(np.array(values, np.int32))


# Contradictions only: offsets that run backwards inside what is there, an index without an entry, bytes no text has.
INCONSISTENT = {
    "offsets that run backwards": pa.Array.from_buffers(
        pa.list_(pa.float32()), 2, [None, offsets([0, 3, 2])], children=[FLOATS]
    ),
    "an index without an entry": pa.DictionaryArray.from_buffers(
        pa.dictionary(pa.int8(), pa.string()), 2, [None, pa.py_buffer(np.array([0, 1], np.int8))], pa.array(["a"])
    ),
    "bytes that are no text": pa.Array.from_buffers(pa.string(), 2, [None, offsets([0, 1, 2]), pa.py_buffer(b"a\xff")]),
}


@pytest.mark.parametrize("what", INCONSISTENT)
@pytest.mark.parametrize("stream", [False, True])
def test_what_contradicts_itself_is_refused_by_the_files_name(what: str, stream: bool, tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_arrays([INCONSISTENT[what]], ["x"])
    with pytest.raises(FctError, match="source: it is damaged: "):
        validated(batch, "it")
    file = tmp_path / "a.arrow"
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, batch.schema) as out:
        out.write_batch(batch)
    source = open_source(file)
    with pytest.raises(FctError, match=r"a\.arrow is damaged|a\.arrow is not"):
        [list(source.read(p, 0, p.rows, 9)) for p in source.pieces()]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_footer_that_is_noise_is_refused_by_the_files_name(suffix: str, tmp_path: Path) -> None:
    mark = b"PAR1" if suffix == ".parquet" else b"ARROW1"
    noise = bytes(range(1, 200)) * 3
    (tmp_path / f"a{suffix}").write_bytes(mark + noise + len(noise).to_bytes(4, "little") + mark)
    with pytest.raises(FctError, match=rf"expected a whole \w+ file, .*a{suffix} is not"):
        open_source(tmp_path / f"a{suffix}").pieces()
