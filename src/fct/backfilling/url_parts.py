"""The fingerprints by which a resumed job knows the places that its URLs name."""

from __future__ import annotations

import secrets
from typing import TypedDict

from fct.backfilling.job import Job
from fct.gallery.url_identity import Parts, identity_parts, keyed
from fct.types import StorageOptions

__all__ = ["UrlParts", "url_parts"]


class UrlParts(TypedDict):
    """Fields of a :class:`Job`."""

    url_key: str
    source_parts: Parts
    side_parts: Parts
    destination_parts: Parts


def url_parts(
    urls: tuple[object, object, object], storage_options: StorageOptions | None, stored: Job | None
) -> UrlParts:
    """Fingerprints of what the URLs of source, side-information and destination name, under the key of the job that was
    begun, else a new one; none where there is no URL."""
    source, side, destination = (identity_parts(where, storage_options) for where in urls)
    if not (source or side or destination):
        return {"url_key": "", "source_parts": (), "side_parts": (), "destination_parts": ()}
    key = stored.url_key if stored is not None and stored.url_key else secrets.token_hex(32)
    return {
        "url_key": key,
        "source_parts": keyed(source, key),
        "side_parts": keyed(side, key),
        "destination_parts": keyed(destination, key),
    }
