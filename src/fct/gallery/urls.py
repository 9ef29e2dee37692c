"""URLs: which schemes are opened, and how one is shown to people, its secrets left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from urllib.parse import unquote

from fct.errors import MissingExtraError
from fct.extras import EXTRAS, need

__all__ = [
    "SCHEMES",
    "check_scheme",
    "redacted",
    "require_package",
    "scheme_of",
    "secrets_of",
    "without_query",
    "without_secrets",
]

# Stores that hold bytes. fsspec knows others that run commands, read mail or unpack what they are given.
SCHEMES = (
    *("file", "local", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"),
    *("http", "https"),
)
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
}  # what fsspec opens a scheme by
_WEB = ("http", "https")
_HIDDEN = "redacted"
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://([^/?#\s]*)([^?#\s]*)(\?[^#\s]*)?(#\S*)?")
_PUBLIC = ("versionId", "generation", "version")  # which version of an object, not who may read it
_DATABASES = ("postgresql", "postgres", "qdrant", "milvus", "chroma")
_NAMES = ("table", "collection", "vector", "id", "side", "columns", "tenant", "database", "alias")  # of their URLs


def scheme_of(url: str) -> str:
    """The scheme in front of ``://``, or "" for a path."""
    return url.partition("://")[0] if "://" in url else ""


def check_scheme(url: str, name: str) -> str:
    """The scheme of a URL that may be opened, "" for a path.

    Raises:
        ValueError: a scheme that is not in :data:`SCHEMES`, or a chain of them (``zip::s3://``).
    """
    scheme = scheme_of(url)
    if "::" in scheme or (scheme and "::" in url.partition("://")[2].partition("://")[0] and url.count("://") > 1):
        raise ValueError(f"{name}: expected one URL, got a chain of them (::), which is not opened: {redacted(url)}")
    if scheme and scheme not in SCHEMES:
        raise ValueError(
            f"{name}: expected a path or a URL of {', '.join(SCHEMES)}, got {redacted(url)}; for another store pass "
            "its fsspec or pyarrow filesystem as filesystem="
        )
    return scheme


def require_package(scheme: str, what: str) -> None:
    """Raises MissingExtraError where the package that opens a scheme's stores is not installed. what: names them."""
    module = _PACKAGES.get(scheme, "")
    if module in EXTRAS:
        need(module, what)
    elif module and find_spec(module) is None:
        raise MissingExtraError(f"{what}: needs {module}, which is not installed: pip install {module}", name=module)


def without_query(url: str) -> str:
    """A web URL up to its query, where the file's name ends; anything else as it is, since a name may hold ``?``."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def redacted(url: str) -> str:
    """The URL without passwords, tokens and signatures: its user part and the values of its query. A path as it is."""
    if "://" not in url and not _signed_name(url):
        return url
    if "://" not in url:
        name, _, query = url.partition("?")
        return f"{name}?{_query(query)}"
    return _URL.sub(_redact, url)


def _signed_name(name: str) -> bool:
    """Whether a bare name carries the query of a signed URL: what is left when only its path was kept."""
    query = name.partition("?")[2].lower()
    return any(mark in query for mark in ("signature=", "sig=", "token=", "credential=", "password=", "secret="))


def _redact(match: re.Match[str]) -> str:
    scheme, host, path, query, fragment = match.groups(default="")
    user, at, server = host.rpartition("@")
    if at and (scheme in _WEB or ":" in user):
        host = f"{_HIDDEN}@{server}"
    shown = f"?{_query(query[1:], _NAMES if scheme in _DATABASES else ())}" if query else ""
    return f"{scheme}://{host}{path}{shown}{'#' + _HIDDEN if fragment else ''}"


def _query(query: str, names: Collection[str] = ()) -> str:
    """names: whose values are shown beside those of every URL."""
    pairs = (pair.partition("=") for pair in query.split("&"))
    shown = (*_PUBLIC, *names)
    return "&".join(f"{key}={value if key in shown or not value else _HIDDEN}" if eq else _bare(key)
                    for key, eq, value in pairs)  # fmt: skip


def _bare(key: str) -> str:
    return key if len(key) < 16 else _HIDDEN  # "?download", but not "?<token>"


def secrets_of(url: str) -> tuple[str, ...]:
    """What :func:`redacted` leaves out, as it may stand in the messages of libraries; longest first."""

    def found() -> Iterator[str]:
        for match in _URL.finditer(url):
            _, host, _, query, fragment = match.groups(default="")
            user, at, _ = host.rpartition("@")
            if at and (match[1] in _WEB or ":" in user):
                yield from (user, user.partition(":")[2])
            for pair in query[1:].split("&"):
                key, eq, value = pair.partition("=")
                public = key in _PUBLIC or (match[1] in _DATABASES and key in _NAMES)
                yield value if eq and not public else "" if eq or len(key) < 16 else key
            yield fragment[1:]

    parts = {spelling for part in found() if part for spelling in (part, unquote(part))}
    return tuple(sorted((p for p in parts if len(p) >= 3), key=len, reverse=True))


def without_secrets(text: str, url: str) -> str:
    """A library's message about ``url``, its secrets left out."""
    for secret in secrets_of(url):
        text = text.replace(secret, _HIDDEN)
    return text
