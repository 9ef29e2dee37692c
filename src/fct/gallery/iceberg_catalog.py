"""``iceberg://CATALOG/NAMESPACE.TABLE``: a table by the catalog that pyiceberg knows by that name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard
from urllib.parse import parse_qsl, unquote, urlsplit

from fct.errors import FctError
from fct.extras import need
from fct.gallery.location import Location, RetryPolicy, location_of
from fct.types import JsonDict, StorageOptions

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table


__all__ = ["NAMES", "IcebergAddress", "fsspec_options", "is_iceberg"]

_ICEBERG = "iceberg://"
# fsspec's names for S3 and what pyiceberg calls the same.
NAMES = {
    "key": "s3.access-key-id", "secret": "s3.secret-access-key", "token": "s3.session-token",
    "endpoint_url": "s3.endpoint", "region_name": "s3.region",
}  # fmt: skip


def is_iceberg(location: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(location, (str, os.PathLike)) and os.fspath(location).startswith(_ICEBERG)


def fsspec_options(properties: Mapping[str, str]) -> JsonDict | None:
    """Properties of a table's store as fsspec takes them; None where there are none."""
    found: JsonDict = {ours: properties[theirs] for ours, theirs in NAMES.items() if theirs in properties}
    region = found.pop("region_name", None)
    if region is not None:
        found["client_kwargs"] = {"region_name": region}
    return found or None


@dataclass(frozen=True)
class IcebergAddress:
    """catalog: its name in pyiceberg's configuration. table: (namespace, ..., name). location: where a new table is to
    lie, "" for where the catalog's warehouse says. properties: of the catalog, beside its configuration."""

    catalog: str
    table: tuple[str, ...]
    location: str
    properties: Mapping[str, str]

    @classmethod
    def of(cls, url: str, properties: StorageOptions | None, name: str) -> IcebergAddress:
        """Raises ValueError for a URL that names no table."""
        parts = urlsplit(url)
        table = tuple(unquote(part) for part in parts.path.strip("/").split("."))
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        location = options.pop("location", "")
        if options:
            raise ValueError(
                f"{name}: expected location alone in the query of {_ICEBERG} URLs, got {sorted(options)[0]!r}; the "
                "catalog's properties are storage options (--storage-option uri=...)"
            )
        if not parts.netloc or len(table) < 2 or not all(table):
            shown = f"{_ICEBERG}{parts.netloc}{parts.path}"
            raise ValueError(f"{name}: expected {_ICEBERG}CATALOG/NAMESPACE.TABLE, got {shown}")
        given = {key: str(value) for key, value in (properties or {}).items()}
        return cls(unquote(parts.netloc), table, location, given)

    @property
    def url(self) -> str:
        return f"{_ICEBERG}{self.catalog}/{'.'.join(self.table)}"

    def open(self) -> Catalog:
        """The catalog. Raises FctError where pyiceberg cannot open it; no property's value is repeated."""
        need("pyiceberg", f"{self.url}, an Iceberg table,")
        from pyiceberg.catalog import load_catalog

        try:
            return load_catalog(self.catalog, **self.properties)
        except Exception as error:
            text = str(error)
            for value in sorted(self.properties.values(), key=len, reverse=True):
                text = text.replace(value, "redacted") if len(value) > 2 else text
            raise FctError(
                f"{self.url}: the catalog {self.catalog!r} could not be opened: {text}; name its properties in "
                "pyiceberg's configuration, or as storage options (--storage-option uri=...)"
            ) from error

    def load(self, catalog: Catalog) -> Table | None:
        """The table, or None where the catalog has none of that name."""
        from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

        try:
            return catalog.load_table(self.table)
        except (NoSuchTableError, NoSuchNamespaceError):
            return None

    def location_of_table(self, catalog: Catalog, table: Table | None) -> str:
        """Where the table lies, or a new one is to lie.

        Raises:
            FctError: a catalog that says it only when a table is made.
        """
        if table is not None:
            return str(table.location())
        if self.location:
            return self.location
        from pyiceberg.exceptions import NoSuchNamespaceError

        *namespace, name = self.table
        try:
            own = str(catalog.load_namespace_properties(tuple(namespace)).get("location") or "")
        except NoSuchNamespaceError:
            own = ""
        if own:
            return f"{own.rstrip('/')}/{name}"
        warehouse = str(catalog.properties.get("warehouse") or "")
        if "://" not in warehouse and not warehouse.startswith("/"):
            raise FctError(
                f"destination: expected a catalog whose warehouse is a folder, {self.catalog!r} does not say where "
                f"{self.url} would lie: add ?location=URL to it, or make the table first"
            )
        return "/".join([warehouse.rstrip("/"), *namespace, name])

    def folder(self, location: str, properties: Mapping[str, str], retry_policy: RetryPolicy) -> Location:
        """That place as fct reads and writes it."""
        plain = location.removeprefix("file://") if location.startswith("file:///") else location.removeprefix("file:")
        return location_of(
            plain, storage_options=fsspec_options(properties), retry_policy=retry_policy, name="destination"
        )
