"""The URL of a table or a collection: ``postgresql://user@host/db?table=items``, ``qdrant://host?collection=c``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeGuard
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

__all__ = ["KINDS", "Address", "Kind", "is_database"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a store's URLs look like. holds: its word for a table. own: further names that its query may have."""

    holds: str
    port: int
    own: tuple[str, ...] = ()


KINDS = {
    "postgresql": Kind("table", 5432, ("id", "side", "columns")),
    "qdrant": Kind("collection", 6333, ("side", "https", "alias")),
    "milvus": Kind("collection", 19530, ("https", "alias")),
    "chroma": Kind("collection", 8000, ("https", "tenant", "database")),
}
_SPELLINGS = {"postgres": "postgresql"}


def is_database(location: object) -> TypeGuard[str]:
    """Whether this is the URL of a vector database."""
    scheme = location.partition("://")[0] if isinstance(location, str) and "://" in location else ""
    return _SPELLINGS.get(scheme, scheme) in KINDS


@dataclass(frozen=True, slots=True)
class Address:
    """A table or collection of a store.

    path: the database's name, or the file or folder of a store without a server. options: what the URL says beside the
    names of its own. The password is in no message: see :attr:`shown`.
    """

    kind: str
    host: str
    port: int
    path: str
    user: str
    password: str = field(repr=False)
    table: str = ""
    vector: str = ""
    options: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str, name: str) -> Address:
        """Raises ValueError for what is no such URL; the message has no secret."""
        scheme = url.partition("://")[0]
        kind = _SPELLINGS.get(scheme, scheme)
        holds = KINDS[kind].holds
        try:
            parts = urlsplit(url)
            port = parts.port or KINDS[kind].port
        except ValueError:
            raise ValueError(f"{name}: expected {kind}://HOST[:PORT]/..., got a port that is no number") from None
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        table, vector = options.pop(holds, ""), options.pop("vector", "")
        if not table:
            raise ValueError(f"{name}: expected a URL that names the {holds}: {kind}://...?{holds}=NAME, got none")
        unknown = set(options) - set(KINDS[kind].own) if kind != "postgresql" else set()
        if unknown:
            known = ", ".join((holds, "vector", *KINDS[kind].own))
            raise ValueError(f"{name}: expected one of {known} in the URL's query, got {sorted(unknown)[0]!r}")
        password = unquote(parts.password or "")
        user, path = unquote(parts.username or ""), unquote(parts.path)
        return cls(kind, parts.hostname or "", port, path, user, password, table, vector, options)

    @property
    def shown(self) -> str:
        """The URL for people and for the journal, without secrets."""
        user = f"{self.user}@" if self.user else ""
        server = f"{user}{self.host}:{self.port}" if self.host else ""
        query = {KINDS[self.kind].holds: self.table} | ({"vector": self.vector} if self.vector else {})
        return f"{self.kind}://{server}{self.path}?{urlencode(query)}"

    def location(self) -> tuple[str | int, ...]:
        """What two addresses of the same table have alike."""
        return self.kind, self.host, self.port, self.path, self.table

    def hidden(self, text: str) -> str:
        """A client's message without this address's secrets."""
        secrets = [self.password, *(v for k, v in self.options.items() if "key" in k or "pass" in k or "token" in k)]
        for secret in secrets:
            if len(secret) > 2:
                text = text.replace(secret, "redacted")
        return " ".join(text.split())
