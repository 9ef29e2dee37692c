"""What a folder, a pattern or links may not gather: parts of a table, of an unfinished backfill, of two spaces.

Each file alone looks like rows. Which rows count is said by what lies around it: a log, a state, a journal, a tag.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from fct.errors import FctError, SpaceMismatchError
from fct.gallery.discovery import root_of
from fct.gallery.location import Location
from fct.gallery.saved_dataset import read_state
from fct.gallery.space_tags import OURS, SIDE_FILE, side_file_space
from fct.gallery.tables import TITLES, refuse_inside, table_kind
from fct.spaces import EmbeddingSpace

__all__ = ["refuse_mixtures"]

_LOOKED_AT = 100  # folders of a store over a network that are asked: each is a request
_CACHE = re.compile(r"(?:tmp)?cache-[0-9a-f]{16}.*\.arrow")  # what map, filter and shuffle of datasets leave


def refuse_mixtures(location: Location, files: Sequence[Location], name: str) -> None:
    """Looks around the files that ``location`` stands for.

    Raises:
        FctError: some lie in a table or a saved dataset, are caches, are of an unfinished backfill, of several splits.
        SpaceMismatchError: some are tagged with a space, and the others with another one or with none.
    """
    _refuse_caches(location, files, name)
    if location.is_local:
        _refuse_links_into_tables(files, name)
    tags: dict[str, EmbeddingSpace] = {}
    for folder, is_root in _folders(location, files):
        kind = None if is_root else table_kind(folder)
        if kind is not None:
            what = TITLES.get(kind, "a saved dataset")
            raise FctError(
                f"{name}: {location} means files of {what}, which may hold rows that it no longer has; name it itself: "
                f"{folder}"
            )
        if (folder / OURS).files():
            _refuse_unfinished(location, folder, name)
            tags |= _tags_in(folder, is_root)
    if tags:
        _refuse_two_spaces(location, files, tags, name)


def _folders(location: Location, files: Sequence[Location]) -> Iterator[tuple[Location, bool]]:
    """(folder, whether it is the one that ``location`` names): all that hold files, and those above them, below it."""
    root = root_of(location).rstrip("/")
    found = {root}
    for file in files:
        folder = file.path.rpartition("/")[0]
        while folder not in found and folder.startswith(root + "/"):
            found.add(folder)
            folder = folder.rpartition("/")[0]
    ordered = sorted(found, key=lambda path: (path.count("/"), path))
    if not location.is_local:  # a partition is no table
        ordered = [path for path in ordered if "=" not in path.rpartition("/")[2]][:_LOOKED_AT]
    return ((location.at(path), path == root) for path in ordered)


def _refuse_caches(location: Location, files: Sequence[Location], name: str) -> None:
    caches = [file for file in files if _CACHE.fullmatch(file.name)]
    if caches and len(caches) < len(files):
        raise FctError(
            f"{name}: {location} means {caches[0].name} too, which datasets left there as a cache of map, filter or "
            "shuffle: its rows are copies; name the others alone, or the dataset after save_to_disk"
        )
    folder = location.at(root_of(location))
    if location.is_pattern or not any(file.name.endswith(".arrow") for file in files):
        return
    if "dataset_info.json" not in folder.files():
        return
    splits = read_state(folder / "dataset_info.json").get("splits")
    known = [s for s in splits if isinstance(s, str)] if isinstance(splits, dict) else []
    held = [s for s in known if any(re.search(rf"(?:^|-){re.escape(s)}(?:-\d+-of-\d+)?\.", f.name) for f in files)]
    if len(held) > 1:
        raise FctError(
            f"{name}: {location} holds the splits {', '.join(held)}, which are galleries of their own; name one, such "
            f"as {folder}/*-{held[0]}*.arrow"
        )


def _refuse_links_into_tables(files: Sequence[Location], name: str) -> None:
    """A link, or a folder reached by one, may lead into a table."""
    seen: set[str] = set()
    for file in files:
        folder = file.path.rpartition("/")[0]
        if folder not in seen and os.path.realpath(folder) != os.path.abspath(folder):
            refuse_inside(file.at(os.path.realpath(file.path)), name)
        if os.path.islink(file.path):
            refuse_inside(file.at(os.path.realpath(file.path)), name)
        seen.add(folder)


def _refuse_unfinished(location: Location, folder: Location, name: str) -> None:
    held = (folder / OURS).files()
    if "job.json" in held and "manifest.json" not in held:
        raise FctError(f"{name}: {location} means files of an unfinished backfill: run it to the end first ({folder})")


def _tags_in(folder: Location, is_root: bool) -> dict[str, EmbeddingSpace]:
    """The spaces that a folder says its files hold, by path: its own (not the root's, which is the gallery's), and
    those of single files."""
    found = {}
    for tag in (folder / OURS).files():
        if not tag.endswith(SIDE_FILE) or (tag == SIDE_FILE and is_root):
            continue
        path = folder if tag == SIDE_FILE else folder / tag.removesuffix(f".{SIDE_FILE}")
        space = side_file_space(path)
        if space is not None:
            found[path.path] = space
    return found


def _refuse_two_spaces(
    location: Location, files: Sequence[Location], tags: dict[str, EmbeddingSpace], name: str
) -> None:
    whole = side_file_space(location)
    seen: dict[EmbeddingSpace | None, Location] = {}
    for file in files:
        path = file.path
        while path and path not in tags:
            path = path.rpartition("/")[0]
        seen.setdefault(tags.get(path, whole), file)
    if len(seen) > 1:
        (a, one), (b, other) = list(seen.items())[:2]
        raise SpaceMismatchError(
            f"{name}: expected vectors of one space, {one} is {_of(a)} and {other} is {_of(b)}: name the one alone, or "
            "write down what the other holds with fct.gallery.tag_space"
        )


def _of(space: EmbeddingSpace | None) -> str:
    return "not tagged" if space is None else f"tagged {space}"
