"""``FILE.npz:MEMBER``, ``FILE.hdf5:/PATH``, ``STORE.zarr:/PATH``: one array of a container that holds several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from fct.errors import FctError
from fct.gallery.file_gallery import FileSource
from fct.gallery.location import Location, location_of

__all__ = ["READ", "Found", "MemberSource", "native_name", "pick_member", "require_matrix", "split_member"]

READ = ("float64", "float32", "float16", "uint8", "int8")  # what rows may be stored in
_CONTAINER = re.compile(r"(.+?\.(?:npz|hdf5|h5|zarr))(?::(.+))?", re.DOTALL)
_IN_ZARR = re.compile(r"(.+?\.zarr)/(.+)", re.DOTALL)  # a path that goes on into the store
_SHOWN = 12
Found = Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape, dtype)


class MemberSource(FileSource):
    """Rows of one array of each container. member: its name or path; "" for the only one that can hold rows."""

    def __init__(self, location: Location, files: Sequence[Location], member: str = "") -> None:
        super().__init__(location, files)
        self.member = member

    @property
    def url(self) -> str:
        return f"{self.location}:{self.member}" if self.member else str(self.location)

    def name_of(self, file: Location) -> str:
        return f"{super().name_of(file)}:{self.member}" if self.member else super().name_of(file)


def split_member(location: str) -> tuple[str, str]:
    """(container, member) of ``CONTAINER:MEMBER``; "" where no member is named. What is there is taken whole.

    Examples:
        >>> from fct.gallery.members import split_member
        >>> split_member("pairs.npz:old"), split_member("glove.hdf5:/train"), split_member("gallery:old")
        (('pairs.npz', 'old'), ('glove.hdf5', '/train'), ('gallery:old', ''))
    """
    match = _CONTAINER.fullmatch(location) or _IN_ZARR.fullmatch(location)
    if match is None or not match[2]:
        return location, ""
    if "://" not in location and match.re is not _IN_ZARR and location_of(location).exists():
        return location, ""
    return match[1], match[2]


def native_name(dtype: np.dtype) -> str:
    """A dtype's name without its byte order."""
    return str(dtype.newbyteorder("=").name)


def pick_member(container: Location, found: Found, wanted: str) -> str:
    """The array that is meant: the one named, or the only one that can hold rows.

    Raises:
        FctError: none of that name, or no single one; names what is there.
    """
    plain = wanted.strip("/")
    if plain:
        if plain not in found:
            raise FctError(f"source: expected an array of {container} ({_listed(found)}), got {wanted!r}")
        return plain
    able = [name for name, (shape, dtype) in found.items() if len(shape) == 2 and dtype in READ]
    if len(able) != 1:
        example = able[0] if able else "NAME"
        raise FctError(
            f"source: {container} holds {_listed(found)}; name the array that holds the rows, such as "
            f"{container}:{example}"
        )
    return able[0]


def require_matrix(location: str, shape: tuple[int, ...], dtype: str, *, read: tuple[str, ...] = READ) -> None:
    """Raises FctError for an array that is no (n, d) rows of a type that is read."""
    if len(shape) != 2 or shape[1] < 1:
        raise FctError(f"source: expected (n, d) rows in {location}, got {shape} {dtype}")
    if dtype not in read:
        raise FctError(f"source: expected floats of 16 to 64 bits or 8-bit integers in {location}, got {dtype}")


def _listed(found: Found) -> str:
    shown = [f"{name} {shape} {dtype}" for name, (shape, dtype) in list(found.items())[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (", ".join(shown) or "no arrays") + more
