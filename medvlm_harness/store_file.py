"""The SQLite file under the store: connections, transactions, digests of rows, and reading what damage left."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from medvlm_harness.errors import UserError

__all__ = [
    "BUSY_SECONDS",
    "DAMAGE",
    "FAILURES",
    "NO_ROOM",
    "DamagedError",
    "Row",
    "SpaceRow",
    "checked",
    "connect",
    "create",
    "digest_of",
    "error_code",
    "fits",
    "forget_length",
    "readable",
    "rows",
    "sound_spaces",
    "structure",
    "take_over",
    "transaction",
]

APPLICATION_ID = 0x4D56_4C4D  # "MVLM", so that nobody else's database is ever taken for a store
FORMAT = 1
# Answers are about 2 kB; on SQLite's usual pages of 4 kB only one would fit, and half of each page stay empty.
PAGE_SIZE = 16_384
BUSY_SECONDS = 60.0
# SQLITE_ERROR ("no such column"): our statements are right, so the schema is not the one that was written.
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)  # the end of a quota is an input/output error
# Python fails to decode what SQLite says of a damaged schema: its message quotes the noise.
FAILURES = (sqlite3.DatabaseError, UnicodeDecodeError)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS spaces (
    id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, name TEXT NOT NULL, kind TEXT NOT NULL,
    content TEXT NOT NULL, used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, space INTEGER NOT NULL, input BLOB NOT NULL, value BLOB NOT NULL, digest BLOB NOT NULL,
    UNIQUE (space, input));
"""


class DamagedError(sqlite3.DatabaseError):
    """What SQLite does not notice itself."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class SpaceRow(NamedTuple):
    """A space as the file holds it."""

    sha256: str
    name: str
    kind: str
    content: str
    used: float


class Row(NamedTuple):
    """An answer as the file holds it, of whatever types damage left, and whether it is what was once written."""

    space: str  # sha256; empty if its space cannot be read
    key: bytes
    value: bytes
    digest: bytes
    sound: bool


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
    connection = checked(connect(path), path)
    try:
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


def checked(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """The connection, if it leads to a store of this format or to a new file; else it is closed.

    Raises:
        UserError: if it is another program's database, or of another format.
        sqlite3.DatabaseError: if it cannot be read.
    """
    try:
        _check_owner(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_owner(connection: sqlite3.Connection, path: Path) -> None:
    names = ("application_id", "user_version", "schema_version")  # read without the tables, which may not be ours
    connection.execute("BEGIN")  # one view: another process may be making the file just now
    owner, version, tables = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    connection.execute("ROLLBACK")
    if owner == version == tables == 0:
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
    numbers: dict[str, int] = {}
    taken = 0
    with transaction(target):
        for space in sound_spaces(source).values():
            if chosen is None or space.sha256 in chosen:
                target.execute(
                    "INSERT OR IGNORE INTO spaces (sha256, name, kind, content, used) VALUES (?, ?, ?, ?, ?)", space
                )
                found = target.execute("SELECT id FROM spaces WHERE sha256 = ?", (space.sha256,)).fetchone()
                if found is not None:  # or the other file's index is damaged
                    numbers[space.sha256] = found[0]
        for row in rows(source, numbers):
            if row.sound:
                taken += target.execute(
                    "INSERT OR IGNORE INTO answers (space, input, value, digest) VALUES (?, ?, ?, ?)",
                    (numbers[row.space], row.key, row.value, row.digest),
                ).rowcount
    return taken


def sound_spaces(connection: sqlite3.Connection) -> dict[int, SpaceRow]:
    """Row number -> every readable space whose description fits its hash."""
    found = {}
    for number, *values in readable(connection, "SELECT id, sha256, name, kind, content, used FROM spaces"):
        space = SpaceRow(*values)
        typed = all(isinstance(text, str) for text in space[:4]) and isinstance(space.used, float)
        if typed and hashlib.sha256(space.content.encode()).hexdigest() == space.sha256:
            found[number] = space
    return found


def rows(connection: sqlite3.Connection, chosen: Container[str] | None = None) -> Iterator[Row]:
    """Every readable answer, or those of the chosen spaces (sha256), in the order of the file."""
    spaces = sound_spaces(connection)
    where = ""
    if chosen is not None:
        numbers = [str(number) for number, space in spaces.items() if space.sha256 in chosen]
        where = f"WHERE +space IN ({','.join(numbers)})"  # the plus: read the table through instead of sorting it
    query = f"SELECT id, space, input, value, digest FROM answers {where}"  # noqa: S608
    for _, number, key, value, digest in readable(connection, query):
        space = spaces[number].sha256 if number in spaces else ""
        yield Row(space, key, value, digest, bool(space) and fits(space, key, value, digest))


def structure(connection: sqlite3.Connection) -> list[str]:
    """What is wrong with the file as a whole, and with the descriptions of its spaces."""
    try:
        problems = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
    except FAILURES as error:
        if error_code(error) not in DAMAGE:
            raise
        problems = [str(error)]
    unsound = len(list(readable(connection, "SELECT id FROM spaces"))) - len(sound_spaces(connection))
    return problems + ([f"the descriptions of {unsound} spaces are damaged"] if unsound else [])


def readable(connection: sqlite3.Connection, query: str) -> Iterator[Any]:
    """The rows of a query that begin with their id, from both ends: damage in the middle of a table hides neither."""
    reached = None
    for order in ("ASC", "DESC"):
        try:
            for row in connection.execute(f"{query} ORDER BY id {order}"):
                if order == "ASC":
                    reached = row[0]
                elif reached is not None and row[0] <= reached:
                    continue  # had from the other end
                yield row
        except FAILURES as error:
            if error_code(error) not in DAMAGE:
                raise
        else:
            return


def forget_length(path: Path) -> None:
    """Take the page count out of a file's header: of a file that is shorter than it says SQLite reads nothing."""
    with path.open("r+b") as file:
        if file.read(16) == b"SQLite format 3\0":
            file.seek(28)  # https://sqlite.org/fileformat.html, section 1.3.8
            file.write(bytes(4))


def fits(space: object, key: object, value: object, digest: object) -> bool:
    """Whether a row is what was once written; in a damaged file any of them may have any type."""
    if not (isinstance(space, str) and isinstance(key, bytes) and isinstance(value, bytes)):
        return False
    return digest == digest_of(space, key, value)


def digest_of(space: str, key: bytes, value: bytes) -> bytes:
    """What binds a value to its space and its input."""
    return hashlib.blake2b(value, digest_size=8, key=hashlib.sha256(space.encode() + key).digest()).digest()


def error_code(error: Exception) -> int:
    """SQLite's primary error code; 0 for an error of Python's own module."""
    if isinstance(error, UnicodeDecodeError):
        return sqlite3.SQLITE_CORRUPT
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
