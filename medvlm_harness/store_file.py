"""The SQLite file under the store: connections, transactions, digests of rows, and reading what damage left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError

__all__ = [
    "DAMAGE",
    "check_owner",
    "connect",
    "create",
    "digest_of",
    "error_code",
    "fits",
    "lengthen",
    "readable",
    "rows",
    "take_over",
    "transaction",
]

APPLICATION_ID = 0x4D56_4C4D  # "MVLM", so that nobody else's database is ever taken for a store
FORMAT = 1
# Answers are about 2 kB; on SQLite's usual pages of 4 kB only one would fit, and half of each page stay empty.
PAGE_SIZE = 16_384
BUSY_SECONDS = 60.0
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS spaces (
    id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, name TEXT NOT NULL, kind TEXT NOT NULL,
    content TEXT NOT NULL, used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, space INTEGER NOT NULL, input BLOB NOT NULL, value BLOB NOT NULL, digest BLOB NOT NULL,
    UNIQUE (space, input));
"""


def connect(target: Path | str) -> sqlite3.Connection:
    """To a file, or to a file: URI."""
    connection = sqlite3.connect(target, timeout=BUSY_SECONDS, isolation_level=None, uri=isinstance(target, str))
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")  # of a damaged row
    return connection


def create(path: Path) -> sqlite3.Connection:
    """Open a store's file for writing; make it if there is none.

    Raises:
        UserError: if it is another program's database, or of another format.
        sqlite3.DatabaseError: if it is damaged, or may not be written.
    """
    connection = connect(path)
    try:
        check_owner(connection, path)
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")  # of a new file
        connection.execute("PRAGMA journal_mode = WAL")
        # A crash of the process loses nothing; one of the machine may lose the last batches, never the file.
        connection.execute("PRAGMA synchronous = NORMAL")
        if connection.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
            with transaction(connection):
                for statement in _SCHEMA.strip().split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
    except BaseException:
        connection.close()
        raise
    return connection


def check_owner(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse another program's database, and a store of another format.

    Raises:
        UserError: for either.
    """
    owner = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if owner == 0 and version == 0 and connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
        return  # new
    if owner != APPLICATION_ID:
        raise UserError(f"{path} is a database of another program: name another file, or store=off.")
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this release reads {FORMAT}: name another file.")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing; waits for another process that is writing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back already after some errors
            connection.execute("ROLLBACK")
        raise


def take_over(source: sqlite3.Connection, target: sqlite3.Connection, chosen: set[str] | None = None) -> int:
    """Add the sound answers of one file to another, which keeps what it has; how many were new.

    Args:
        source: may be damaged; what can be read is taken.
        target: written in one transaction.
        chosen: sha256 of the spaces to take; None for all.
    """
    numbers: dict[int, int] = {}
    taken = 0
    with transaction(target):
        for old, sha256, *values in readable(source, "SELECT id, sha256, name, kind, content, used FROM spaces"):
            sound = hashlib.sha256(str(values[2]).encode()).hexdigest() == sha256
            if sound and (chosen is None or sha256 in chosen):
                target.execute(
                    "INSERT OR IGNORE INTO spaces (sha256, name, kind, content, used) VALUES (?, ?, ?, ?, ?)",
                    (sha256, *values),
                )
                found = target.execute("SELECT id FROM spaces WHERE sha256 = ?", (sha256,)).fetchone()
                if found is not None:
                    numbers[old] = found[0]
        for (space, key, value, digest), sound in rows(source):
            if sound and space in numbers:
                taken += target.execute(
                    "INSERT OR IGNORE INTO answers (space, input, value, digest) VALUES (?, ?, ?, ?)",
                    (numbers[space], key, value, digest),
                ).rowcount
    return taken


def rows(
    connection: sqlite3.Connection, where: str = "", values: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[int, bytes, bytes, bytes], bool]]:
    """Every readable answer, and whether it fits its digest."""
    spaces = dict(readable(connection, "SELECT id, sha256 FROM spaces"))
    query = f"SELECT space, input, value, digest FROM answers {where}"  # noqa: S608
    for row in readable(connection, query, values):
        space, key, value, digest = row
        yield row, space in spaces and fits(spaces[space], key, value, digest)


def readable(connection: sqlite3.Connection, query: str, values: tuple[Any, ...] = ()) -> Iterator[Any]:
    """The rows of a query, from both ends: damage in the middle of a table hides neither."""
    for order in ("ASC", "DESC"):
        try:
            yield from connection.execute(f"{query} ORDER BY id {order}", values)
        except sqlite3.DatabaseError as error:
            if error_code(error) not in DAMAGE:
                raise
        else:
            return


def lengthen(path: Path) -> None:
    """Fill a truncated file with empty pages up to the size in its header: SQLite reads nothing of a shorter one."""
    # https://sqlite.org/fileformat.html, section 1.3: page size at byte 16 (1 stands for 65536), page count at 28.
    with path.open("rb") as file:
        header = file.read(100)
    if header.startswith(b"SQLite format 3"):
        size = int.from_bytes(header[16:18], "big")
        whole = (65_536 if size == 1 else size) * int.from_bytes(header[28:32], "big")
        if path.stat().st_size < whole:
            os.truncate(path, whole)


def fits(space: str, key: object, value: object, digest: object) -> bool:
    """Whether a row is what was once written; in a damaged file a value may have any type."""
    return isinstance(key, bytes) and isinstance(value, bytes) and digest == digest_of(space, key, value)


def digest_of(space: str, key: bytes, value: bytes) -> bytes:
    """What binds a value to its space and its input."""
    return hashlib.blake2b(value, digest_size=8, key=hashlib.sha256(space.encode() + key).digest()).digest()


def error_code(error: sqlite3.Error) -> int:
    """SQLite's primary error code; 0 for an error of Python's own module."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
