"""What of a URL says which gallery it is, part by part, and what only says how it is reached or who may read it.

The same gallery: another signature, token, expiry or password, another order of the query, the spellings of one scheme
(``s3a``, ``gcs``, ``abfs``, ``postgres``), a port that is written out. Another one: another scheme, host, port, user,
bucket, container, path, table, collection or vector, and any further name of a query that is no credential.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from fct.gallery.databases.address import KINDS
from fct.gallery.location import DELTA, Location
from fct.types import StorageOptions

__all__ = ["Parts", "differing_parts", "identity_parts", "keyed"]

Parts = tuple[tuple[str, str], ...]
_SCHEMES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "postgres": "postgresql"}
_PORTS = {"http": 80, "https": 443, **{kind: known.port for kind, known in KINDS.items()}}
_BUCKETS = ("s3", "gs")
_MAY_BE_UNSAID = ("endpoint", "account")  # compared where both name one: it may come from the environment
# Names that say who reads, for how long and by whose leave, whatever the store; in lower case.
_WORDS = ("token", "secret", "password", "passwd", "signature", "credential", "apikey", "api_key", "api-key", "hmac")
_NAMES = (
    *("sig", "auth", "authorization", "expires", "expiry", "expire", "exp", "policy", "key-pair-id", "jwt", "nonce"),
    *("awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "access_key", "accesskey", "hdnts", "hdnea", "x-id"),
)
_BEGINNINGS = ("x-amz-", "x-goog-", "x-oss-", "x-cos-", "x-obs-", "q-", "response-")
# Azure's shared access signatures, whose short names mean something else where there is no signature.
_SAS = (
    *("sv", "ss", "srt", "sp", "se", "st", "spr", "sr", "si", "sip", "sdd", "ses", "skoid", "sktid", "skt", "ske"),
    *("sks", "skv", "saoid", "suoid", "scid", "rscc", "rscd", "rsce", "rscl", "rsct"),
)
# Of libpq and of fct's own: how a server is reached.
_HOW = (
    *("connect_timeout", "application_name", "fallback_application_name", "keepalives", "keepalives_idle"),
    *("keepalives_interval", "keepalives_count", "tcp_user_timeout", "client_encoding", "target_session_attrs"),
    *("load_balance_hosts", "channel_binding", "require_auth", "requirepeer", "requiressl", "passfile", "krbsrvname"),
    *("gssencmode", "gsslib", "gssdelegation", "https", "alias"),
)


def identity_parts(location: object, storage_options: StorageOptions | None = None) -> dict[str, str]:
    """The parts of a URL that say what is read, by the name of their kind; {} for a path of this machine.

    Examples:
        >>> from fct.gallery.url_identity import identity_parts
        >>> identity_parts("https://host/a.npy?X-Amz-Signature=12&part=3")
        {'scheme': 'https', 'host': 'host', 'port': '443', 'path': 'a.npy', 'query': 'part=3'}
    """
    url = _url_of(location).removeprefix(DELTA)
    if "://" not in url or url.startswith(("file://", "local://")):
        return {}
    try:
        split = urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address
        return {"path": url.partition("?")[0].rpartition("@")[2]}
    scheme = _SCHEMES.get(split.scheme.lower(), split.scheme.lower())
    pairs = parse_qsl(split.query, keep_blank_values=True)
    if scheme in KINDS:
        found = _of_database(scheme, split, dict(pairs))
    else:
        found = {"scheme": scheme, **_of_store(scheme, split, storage_options or {}), "path": _path(split.path)}
        found["query"] = _query(pairs)
    return {name: value for name, value in found.items() if value}


def _url_of(location: object) -> str:
    if isinstance(location, Location):
        return "" if location.is_local else str(location.fs.unstrip_protocol(location.path))
    if isinstance(location, (str, os.PathLike)):
        return str(os.fspath(location))
    url = getattr(location, "url", "")
    return url if isinstance(url, str) else ""


def _path(path: str) -> str:
    return unquote(path).strip("/")


def _of_store(scheme: str, split: SplitResult, options: StorageOptions) -> dict[str, str]:
    """The server or the bucket, and the endpoint where the storage options name one."""
    name, host = split.username or "", (split.hostname or "").rstrip(".")
    if scheme == "az":
        account = host.partition(".")[0] if split.username else str(options.get("account_name") or "")
        return {"container": name or host, "account": account.lower()}
    if scheme in _BUCKETS:
        client = options.get("client_kwargs")
        inner = client.get("endpoint_url") if isinstance(client, Mapping) else None
        endpoint = str(options.get("endpoint_url") or inner or "").rstrip("/").lower()
        return {"bucket": split.netloc.rpartition("@")[2], "endpoint": endpoint.rpartition("@")[2]}
    user = unquote(name) if split.password is not None else ""  # alone it is a token
    return {"host": host, "port": str(_port(split) or _PORTS.get(scheme) or ""), "user": user}


def _port(split: SplitResult) -> int | None:
    try:
        port: int | None = split.port
    except ValueError:
        return None
    return port


def _of_database(scheme: str, split: SplitResult, query: dict[str, str]) -> dict[str, str]:
    holds = KINDS[scheme].holds
    host = split.hostname or ""
    user, path, port = unquote(split.username or ""), _path(split.path), _port(split)
    if scheme == "postgresql":  # libpq takes these in either place
        host = host or query.pop("host", "") or query.pop("hostaddr", "")
        user, path = user or query.pop("user", ""), path or query.pop("dbname", "")
        given = query.pop("port", "")
        port = port or (int(given) if given.isdecimal() else None)
    return {
        "scheme": scheme, "host": host.lower() if not host.startswith("/") else host.rstrip("/"),
        "port": str(port or _PORTS[scheme]) if host else "", "user": user, "path": path,
        holds: query.pop(holds, ""), "vector": query.pop("vector", ""), "query": _query(list(query.items())),
    }  # fmt: skip


def _query(pairs: list[tuple[str, str]]) -> str:
    """What of a query says what is read, in one order."""
    names = {name.lower() for name, _ in pairs}
    kept = sorted(f"{name}={value}" for name, value in pairs if not _is_passing(name.lower(), value, names))
    return "&".join(kept)


def _is_passing(name: str, value: str, names: set[str]) -> bool:
    """Whether a name of a query, in lower case, is a credential, a signature or a way to connect."""
    if name in _NAMES or name in _HOW or name.startswith(("ssl", *_BEGINNINGS)) or any(w in name for w in _WORDS):
        return True
    if not value and len(name) >= 16:
        return True  # a token as the whole query
    if name == "version" and value.isdecimal():
        return True  # of a table: the journal names it
    return name in _SAS and "sig" in names


def keyed(parts: Mapping[str, str], key: str) -> Parts:
    """Each part as a keyed hash, sorted by its name. key: hex digits."""

    def digest(name: str, value: str) -> str:
        body = f"{name}\0{value}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(body, key=bytes.fromhex(key), person=b"fct.url", digest_size=16).hexdigest()

    return tuple((name, digest(name, value)) for name, value in sorted(parts.items()))


def differing_parts(then: Parts, now: Parts) -> list[str]:
    """Names of the parts that are not the same under one key. [] where one of both is no URL, or was not kept."""
    if not then or not now:
        return []
    old, new = dict(then), dict(now)
    names = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)]
    return [n for n in names if n not in _MAY_BE_UNSAID or (n in old and n in new)]
