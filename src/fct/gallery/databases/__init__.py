"""Vector databases as galleries, by URL: PostgreSQL with pgvector, Qdrant, Milvus, Chroma.

One small base (:mod:`fct.gallery.databases.database_gallery`) has what they share; a file a store has the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from fct.extras import need
from fct.gallery.databases.address import Address, is_database
from fct.gallery.databases.database_gallery import DatabaseDestination, DatabaseSource
from fct.gallery.location import RetryPolicy

__all__ = ["DatabaseDestination", "DatabaseSource", "database_destination", "database_source", "is_database"]

# kind -> the modules of its source and of its destination
_STORES = {
    "postgresql": ("postgres_source.PostgresSource", "postgres_destination.PostgresDestination"),
    "qdrant": ("qdrant_collection.QdrantSource", "qdrant_collection.QdrantDestination"),
    "milvus": ("milvus_collection.MilvusSource", "milvus_collection.MilvusDestination"),
    "chroma": ("chroma_collection.ChromaSource", "chroma_collection.ChromaDestination"),
}


_PACKAGES = {"postgresql": "psycopg", "qdrant": "qdrant_client", "milvus": "pymilvus", "chroma": "chromadb"}


def _class(name: str) -> object:
    module, _, found = name.partition(".")
    return getattr(import_module(f"fct.gallery.databases.{module}"), found)


def database_source(url: str, retry_policy: RetryPolicy, *, name: str = "source") -> DatabaseSource:
    """The source behind a database's URL. Raises ValueError for a URL that names no table or collection, and
    MissingExtraError where its client is not installed."""
    address = Address.parse(url, name)
    need(_PACKAGES[address.kind], f"{name}: {address.shown}")
    return cast("type[DatabaseSource]", _class(_STORES[address.kind][0]))(address, retry_policy)


def database_destination(url: str, retry_policy: RetryPolicy) -> DatabaseDestination:
    """The destination behind a database's URL."""
    address = Address.parse(url, "destination")
    need(_PACKAGES[address.kind], f"destination: {address.shown}")
    return cast("type[DatabaseDestination]", _class(_STORES[address.kind][1]))(address, retry_policy)
