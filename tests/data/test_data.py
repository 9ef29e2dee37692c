"""Image sets: the idx reader, the embedded subset, CIFAR-100's pickles, folders, class splits."""

from __future__ import annotations

import gzip
import lzma
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fct.data import ImageSet, first_classes, load_cifar100, load_fashion_mnist, load_image_folder, read_idx
from fct.errors import ArtifactError


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix, packed", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_idx_round_trip_and_truncation(tmp_path: Path, suffix: str, packed: Any) -> None:
    array = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    file = tmp_path / f"a-idx3-ubyte{suffix}"
    whole = idx_bytes(array)
    file.write_bytes(packed(whole))
    np.testing.assert_array_equal(read_idx(file, rank=3), array)
    with pytest.raises(ArtifactError, match=r"expected 1 dimensions, .* has 3"):
        read_idx(file, rank=1)
    for data, message in (
        (whole[:-1], "expected 30 bytes .* holds 29: it is truncated"),
        (whole + b"x", "holds 31: it is longer"),
        (whole[:9], "ends after 9 bytes: it is truncated"),
        (b"\x89PNG" + whole, "expected the magic 00 00 08 .* has '89 50 4e'"),
        (b"", "expected the magic"),
    ):
        file.write_bytes(packed(data))
        with pytest.raises(ArtifactError, match=message):
            read_idx(file)
    if suffix:
        file.write_bytes(packed(whole)[:-5])
        with pytest.raises(ArtifactError, match=rf"expected a whole {suffix} file, {file}"):
            read_idx(file)


def test_embedded_fashion_mnist() -> None:
    for split, each in (("train", 1000), ("test", 300)):
        images = load_fashion_mnist(split)
        assert images.images.shape == (10 * each, 1, 28, 28)
        np.testing.assert_array_equal(np.bincount(images.labels), np.full(10, each))
    assert 65 < images.images.mean() < 80  # the published mean is 72.9: real images, the right way up
    assert images.images[:, 0, 14].mean() > 2 * images.images[:, 0, 0].mean()
    with pytest.raises(ValueError, match=r"split: expected 'train' or 'test', got 'val'"):
        load_fashion_mnist("val")


def test_fashion_mnist_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected t10k-images-idx3-ubyte, .* got none"):
        load_fashion_mnist("test", tmp_path)
    images, labels = np.zeros((4, 28, 28), np.uint8), np.array([1, 2, 3, 9], np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    assert load_fashion_mnist("test", tmp_path).labels.tolist() == [1, 2, 3, 9]
    for bad, message in ((labels[:3], "expected 4 labels"), (labels + 1, "expected labels 0 to 9")):
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(bad))
        with pytest.raises(ArtifactError, match=message):
            load_fashion_mnist("test", tmp_path)


def test_image_set_takes_classes_and_resizes() -> None:
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (7, 1, 9, 9), dtype=np.uint8), np.arange(7) % 3, ("a", "b", "c"))
    part = images.of_classes([2, 0])
    assert part.labels.tolist() == [0, 2, 0, 2, 0]
    np.testing.assert_array_equal(part.images[1], images.images[2])
    assert part.resized(4).images.shape == (5, 1, 4, 4)
    image, label = part[1]
    assert image.shape == (1, 9, 9)
    assert label == 2
    with pytest.raises(ValueError, match=r"classes: expected 0 to 2, got \[3\]"):
        images.of_classes([3])
    with pytest.raises(ValueError, match=r"labels: expected \(7,\) to match images, got \(6,\)"):
        ImageSet(images.images, images.labels[1:], images.class_names)
    with pytest.raises(ValueError, match=r"labels: expected 0 to 1, got 0 to 2"):
        ImageSet(images.images, images.labels, ("a", "b"))


def test_first_classes() -> None:
    assert first_classes(10) == range(5)
    assert first_classes(365, 182) == range(182)
    assert first_classes(3, 0.1) == range(1)
    for bad in (0, 11, 1.0, 0.0, -0.5):
        with pytest.raises(ValueError, match=r"share: expected"):
            first_classes(10, bad)


# ---- CIFAR-100 ----
def write_cifar(folder: Path, n: int = 6, protocol: int = 2, **changes: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    batch = {b"data": data, b"fine_labels": [i % 3 for i in range(n)], b"filenames": [b"x"] * n} | changes
    (folder / "train").write_bytes(pickle.dumps(batch, protocol=protocol))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple", b"bear", b"cup"]}, protocol=protocol))
    return data


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar_reads_arrays(tmp_path: Path, protocol: int) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = write_cifar(folder, protocol=protocol)
    images = load_cifar100("train", tmp_path)
    np.testing.assert_array_equal(images.images.reshape(6, -1), data)
    assert images.class_names == ("apple", "bear", "cup")
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(FileNotFoundError, match=r"cifar-100: expected .*test"):
        load_cifar100("test", tmp_path)


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_cifar_refuses_a_pickle_that_runs_code(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    write_cifar(tmp_path, b=_Evil(marker))
    with pytest.raises(ArtifactError, match=r"plain containers only, got (posix|nt)\.mkdir"):
        load_cifar100("train", tmp_path)
    assert not marker.exists()


def test_cifar_refuses_object_arrays_with_code_and_damaged_files(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    write_cifar(tmp_path, b=np.array([_Evil(marker)], dtype=object))
    with pytest.raises(ArtifactError, match=r"plain containers only|expected numbers of"):
        load_cifar100("train", tmp_path)
    assert not marker.exists()
    write_cifar(tmp_path)
    (tmp_path / "train").write_bytes((tmp_path / "train").read_bytes()[:500])
    with pytest.raises(ArtifactError, match=r"expected a whole pickle"):
        load_cifar100("train", tmp_path)
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"fine_labels": [0, 1]}))
    with pytest.raises(ArtifactError, match=r"expected data \(n, 3072\) uint8 .* got \(2, 5\)"):
        load_cifar100("train", tmp_path)
    (tmp_path / "train").write_bytes(pickle.dumps([1]))
    with pytest.raises(ArtifactError, match=r"expected a dict .* got list"):
        load_cifar100("train", tmp_path)


# ---- folders ----
def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_image_folders_as_published(tmp_path: Path) -> None:
    write_image(tmp_path / "train/a/airfield/1.png", (250, 0, 0))
    write_image(tmp_path / "train/f/field/cultivated/2.png", (0, 250, 0))
    write_image(tmp_path / "train/f/field/wild/3.PNG", (0, 0, 250), size=(10, 90))
    write_image(tmp_path / "val/airfield/1.png", (250, 0, 0))
    (tmp_path / "train/a/airfield/notes.txt").write_text("no image")
    images = load_image_folder(tmp_path, "train", size=16)
    assert images.class_names == ("airfield", "field-cultivated", "field-wild")
    assert images.labels.tolist() == [0, 1, 2]
    for i in range(3):
        image, label = images[i]
        assert image.shape == (3, 16, 16)
        assert image[i].min() > 240
        assert label == i
    assert images.with_(random_crop=True, size=9)[2][0].shape == (3, 9, 9)
    assert images.of_classes([1]).labels.tolist() == [1]
    assert load_image_folder(tmp_path, "val").class_names == ("airfield",)


def test_image_folder_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data: expected the folder .*train"):
        load_image_folder(tmp_path, "train")
    (tmp_path / "train/x").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"expected images in folders of classes .* got none"):
        load_image_folder(tmp_path, "train")
    (tmp_path / "train/x/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images: expected an image, .*a\.png is none"):
        load_image_folder(tmp_path, "train")[0]


class _Spelt:
    """An array as a pickle may spell it by hand: its own shape, dtype and bytes."""

    def __init__(self, shape: Any, dtype: Any, data: Any) -> None:
        self.state = (1, shape, dtype, False, data)

    def __reduce__(self) -> Any:
        made = np.empty(0, np.uint8).__reduce__()
        return (made[0], made[1], self.state)


SPELT = {
    "too few bytes": (_Spelt((6, 3072), np.dtype("u1"), b"x"), "expected 18432 bytes for an array"),
    "a negative size": (_Spelt((-6, 3072), np.dtype("u1"), b"x"), "a shape of at most 4 whole numbers"),
    "a huge size": (_Spelt((1 << 40, 3072), np.dtype("u1"), b"x"), "a shape of at most 4 whole numbers"),
    "objects": (_Spelt((1,), np.dtype("O"), [1]), "expected numbers of"),
    "no bytes": (_Spelt((1,), np.dtype("u1"), [1]), "plain numbers and their bytes"),
}


@pytest.mark.parametrize("name", SPELT)
def test_cifar_builds_arrays_from_plain_bytes_alone(name: str, tmp_path: Path) -> None:
    array, message = SPELT[name]
    write_cifar(tmp_path, extra=array)
    with pytest.raises(ArtifactError, match=message):
        load_cifar100("train", tmp_path)
