"""Memory that is used again must never be used again too early."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pyarrow as pa

from fct.gallery.recycler import Recycler
from fct.gallery.vectors import vector_array


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_memory_comes_back_once_nobody_has_it() -> None:
    memory = Recycler()
    first = memory.empty((100, 8), np.float32)
    assert first.shape == (100, 8)
    assert first.dtype == np.float32
    assert address(first) % 64 == 0
    assert first.flags.writeable
    place = address(first)
    second = memory.empty((100, 8), np.float32)
    assert not np.shares_memory(first, second)
    del first
    assert address(memory.empty((99, 8), np.float32)) == place
    assert address(memory.empty((10, 8), np.float32)) != place, "a tenth of a block would waste it"
    assert memory.empty((0, 8), np.float32).shape == (0, 8)


def test_whatever_looks_at_it_keeps_it() -> None:
    memory = Recycler()
    array = memory.empty((64, 8), np.float32)
    place = address(array)
    holders = {
        "a view of a view": array[3:40][1:5, 2:].T,
        "other bytes": array.view(np.uint8)[5:7],
        "an Arrow column": vector_array(array),
        "a slice of a record batch": pa.record_batch({"v": vector_array(array, "binary")}).slice(7, 2),
        "a buffer": pa.py_buffer(array).slice(64, 4),
        "a memoryview": memoryview(array.data)[2:3],
    }
    del array
    assert not memory._free
    while holders:
        name = next(iter(holders))
        del holders[name]
        assert bool(memory._free) == (not holders), f"after {name} was gone"
    assert address(memory.empty((64, 8), np.float32)) == place


def test_a_bounded_number_of_blocks_waits() -> None:
    memory = Recycler(keep=2)
    arrays = [memory.empty((10, 10), np.int8) for _ in range(5)]
    del arrays
    assert len(memory._free) == 2
    assert not pickle.loads(pickle.dumps(memory))._free


def test_threads_never_share_a_block() -> None:
    memory = Recycler()
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(2000):
            block = memory.empty((16, 16), np.int32)
            block[:] = mark
            view = block[4:8]
            del block
            if (view != mark).any():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
