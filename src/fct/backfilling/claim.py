"""What stands in a new gallery's folder while a backfill whose journal lies elsewhere is at work there, and only then.

A journal beside the rows says itself that they are unfinished and whose they are. One elsewhere leaves a claim in the
folder: ``_fct/job.json``, which readers take for an unfinished backfill, and which is gone when the gallery is whole.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from fct.backfilling.checked_json import SchemaError, parse, record, sealed, text, unsealed
from fct.backfilling.confined import open_confined, read_confined, refuse_links
from fct.checks import shown
from fct.errors import BackfillError
from fct.gallery.location import Location
from fct.gallery.space_tags import OURS

if TYPE_CHECKING:
    from fct.backfilling.journal import Journal

__all__ = ["claimed_by", "known_key", "refuse_claimed", "release", "take_claim"]

_NAME = "job.json"
_KEY = "claim"  # in the journal: what tells its claim from another's
_BYTES = 1 << 17
_CHECK: Callable[[object, str], dict[str, str]] = record(dict, (), key=text(64, "[0-9a-f]{32}"), journal=text(65536))


def claimed_by(folder: Location) -> tuple[str, str] | None:
    """(key, journal) of the backfill at work in a folder; None where none is, or its journal lies there itself."""
    try:
        if folder.is_local:
            data = read_confined(folder.local, f"{OURS}/{_NAME}", _BYTES)
        else:
            place = folder / OURS / _NAME
            data = place.read_bytes() if place.version().bytes <= _BYTES else b""
        found = _CHECK(unsealed(parse(data, _BYTES)), "")
    except (FileNotFoundError, NotADirectoryError, SchemaError):
        return None  # what a damaged journal is, is said by whoever reads it
    return found["key"], found["journal"]


def refuse_claimed(folder: Location, key: str = "") -> None:
    """Raises BackfillError where a backfill is at work whose journal lies elsewhere, unless that of ``key``."""
    found = claimed_by(folder)
    if found is not None and found[0] != key:
        raise BackfillError(
            f"destination: {folder} is an unfinished backfill with its journal at {shown(found[1])}: name it with "
            "--journal (journal=), or choose another destination"
        )


def take_claim(journal: Journal) -> bool:
    """Claims the destination for a journal that lies elsewhere. Whether it was not claimed before.

    Raises:
        BackfillError: another backfill's journal, or claim, is there.
    """
    if not journal.apart:
        return False
    key, folder = _key_of(journal), journal.destination
    place = folder / OURS / _NAME
    if not place.exists() and _write(place, sealed({"key": key, "journal": str(journal.root)})):
        return True
    refuse_claimed(folder, key)
    if claimed_by(folder) is None:
        raise BackfillError(
            f"destination: {folder} has a journal of its own, {folder / OURS}: go on without --journal (journal=), or "
            "choose another destination"
        )
    return False


def known_key(journal: Journal) -> str:
    """The journal's own word; "" where it has none yet."""
    try:
        return str(text(64, "[0-9a-f]{32}")(journal.read(_KEY, 64).decode(), _KEY))
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (SchemaError, UnicodeDecodeError) as error:
        raise BackfillError(f"journal: {journal.root / _KEY} is damaged ({error}): restore it from a copy") from error


def _key_of(journal: Journal) -> str:
    """The journal's own word, made when it is first needed."""
    key = known_key(journal)
    if not key:
        key = secrets.token_hex(16)
        journal.inside(_KEY).write_bytes(key.encode())
    return key


def _write(location: Location, data: bytes) -> bool:
    """Whether the claim could be made: on this machine one of two wins, whenever they come."""
    if not location.is_local:
        location.write_bytes(data)
        return True
    folder = location.parent.parent.local
    refuse_links(folder, f"{OURS}/{_NAME}")
    location.parent.local.mkdir(parents=True, exist_ok=True)
    part = location.parent.local / f".{_NAME}.{secrets.token_hex(8)}.part"
    part.write_bytes(data)
    try:
        os.link(part, location.local)  # whole, and only where there is none
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: whole, but two that come at one instant are not told apart
        descriptor = open_confined(folder, f"{OURS}/{_NAME}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    finally:
        part.unlink(missing_ok=True)
    return True


def release(journal: Journal) -> None:
    """Takes the claim away, and the folder that it lay in: nothing but the gallery's files is left."""
    found = claimed_by(journal.destination) if journal.apart else None
    if found is None or found[0] != _key_of(journal):
        return
    folder = journal.destination / OURS
    if folder.is_local:
        refuse_links(folder.parent.local, f"{OURS}/parts")
        shutil.rmtree(folder.local / "parts", ignore_errors=True)
    (folder / _NAME).remove()
    if folder.is_local:
        with contextlib.suppress(OSError):  # somebody's index lies there
            folder.local.rmdir()
