"""The store: what a model answered, kept by content, so that nothing is computed twice and no crash loses work.

An answer is found by everything that decides it and by nothing else: a `Space` (weights, preprocessing, precision,
quantisation, adapter, code; kind of answer; prompt; perturbation) and the hash of the input. Paths and names are never
part of it. All of it is one SQLite file in WAL mode, which several processes share and which may be killed at any
moment: a batch is one transaction.

A store must never stop a run, nor change a number. What cannot be written is left out, and said once; every answer
carries a digest, and one that does not fit it is computed again; a damaged file is set aside, what can still be read is
taken over, and a new one begun.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from medvlm_harness.cache import cache_folder
from medvlm_harness.errors import UserError
from medvlm_harness.store_file import (
    BUSY_SECONDS,
    DAMAGE,
    FAILURES,
    NO_ROOM,
    DamagedError,
    checked,
    connect,
    create,
    digest_of,
    error_code,
    fits,
    forget_length,
    rows,
    sound_spaces,
    structure,
    take_over,
    transaction,
)

__all__ = ["Answers", "Space", "SpaceInfo", "Store", "Verification", "default_path", "open_store"]

_log = logging.getLogger("lm_eval.medvlm")

ENVIRONMENT = "MEDVLM_STORE"
SUFFIX = ".sqlite"
ROWS_PER_QUERY = 500
FILE_FAILURES = (OSError, NotImplementedError)  # the second: filelock, where the file system has no locks

Answers = dict[str, bytes]
"""Input hash -> the answer's bytes."""


@dataclass(frozen=True)
class Space:
    """Everything that decides an answer but its input; two spaces are one if their contents are equal."""

    kind: str  # what is answered: "embed:image", "embed:text", "classify", "loglikelihood", "generate_until", "facts"
    model: Mapping[str, Any]  # plain JSON: hashes of weights and settings, preprocessing, precision, code
    prompt: str = ""  # whatever words the model sees beside the input
    perturbation: str = ""  # what was done to the input before the model saw it
    name: str = field(default="", compare=False)  # the model's name, for people

    @property
    def content(self) -> str:
        """All that counts, as JSON with sorted keys."""
        parts = {"kind": self.kind, "model": self.model, "prompt": self.prompt, "perturbation": self.perturbation}
        return json.dumps(parts, sort_keys=True, allow_nan=False)

    @cached_property
    def sha256(self) -> str:
        """The space's identity."""
        return hashlib.sha256(self.content.encode()).hexdigest()


class SpaceInfo(NamedTuple):
    """A space as it lies in a file, and how much is in it."""

    space: Space
    answers: int
    bytes: int
    used: float  # seconds since the epoch


class Verification(NamedTuple):
    """What `medvlm store verify` found."""

    answers: int
    damaged: int
    problems: tuple[str, ...]  # of the file; SQLite words most of them

    @property
    def sound(self) -> bool:
        """Whether there is nothing to mend."""
        return not (self.damaged or self.problems)


def default_path() -> Path:
    """The file under the user's cache folder (XDG_CACHE_HOME), or what MEDVLM_STORE names."""
    given = os.environ.get(ENVIRONMENT, "")
    return Path(given).expanduser() if given not in ("", "off") else cache_folder() / f"store{SUFFIX}"


def open_store(option: str = "auto") -> Store | None:
    """The store of a run: `auto` is the default file, `off` none, anything else a file's path.

    Raises:
        UserError: if the path is not named *.sqlite, or is somebody else's database.
    """
    if option == "off" or (option == "auto" and os.environ.get(ENVIRONMENT) == "off"):
        return None
    return Store(default_path() if option == "auto" else Path(option).expanduser())


class Store:
    """One file of answers. Keep an instance to one thread; open one per process.

    With `read_only` the file is neither made nor changed, whatever its state.

    Raises:
        UserError: if the path is not named *.sqlite, or is somebody else's database.
        sqlite3.DatabaseError, UnicodeDecodeError: with `read_only`, if it cannot be read.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        # A damaged file is renamed: without this rule a slip of the pen would rename somebody's weights.
        if path.suffix != SUFFIX or os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises where it may not look
            raise UserError(f"Expected store to be off, or a file named *{SUFFIX}, but got {path}.")
        self.path = path
        self._touched: set[str] = set()
        self._connection: sqlite3.Connection | None = None
        self._opened_file: int | None = None  # its inode
        self._writable = not read_only
        self._warned: set[str] = set()
        if read_only:
            self._use(self._connect_read_only())
        else:
            self._open()

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    # --- answers

    def get(self, space: Space, inputs: Iterable[str]) -> Answers:
        """What is stored for these inputs (hashes, in hexadecimal); those that are not there are left out."""
        asked = list(inputs)
        try:
            return self._get(space, asked)
        except FAILURES as error:
            self._mend(error)
        try:
            return self._get(space, asked)
        except FAILURES as error:
            self._give_up(error)
            return {}

    def put(self, space: Space, answers: Mapping[str, bytes]) -> None:
        """Keep answers, all of them or none; replaces what was there."""
        try:
            self._put(space, answers)
        except FAILURES as error:
            self._mend(error)
            if error_code(error) in DAMAGE:
                with contextlib.suppress(*FAILURES):
                    self._put(space, answers)

    def _get(self, space: Space, asked: list[str]) -> Answers:
        number = self._number(space, create=False)
        if self._connection is None or number is None:
            return {}
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk: `put` will say so
            self._touch(space, number)
        found: Answers = {}
        damaged = 0
        for start in range(0, len(asked), ROWS_PER_QUERY):
            keys = [bytes.fromhex(one) for one in asked[start : start + ROWS_PER_QUERY]]
            marks = ",".join("?" * len(keys))
            query = f"SELECT input, value, digest FROM answers WHERE space = ? AND input IN ({marks})"  # noqa: S608
            for key, value, digest in self._connection.execute(query, (number, *keys)):
                if fits(space.sha256, key, value, digest):
                    found[key.hex()] = value
                else:
                    damaged += 1
        if damaged:
            self._warn("damaged", f"{damaged} stored answers do not fit their digest and are computed again")
        return found

    def _put(self, space: Space, answers: Mapping[str, bytes]) -> None:
        if self._connection is None or not self._writable or not answers:
            return
        with transaction(self._connection):
            number = self._number(space, create=True)
            if number is None:
                raise DamagedError("a space that was written is not found")
            self._touch(space, number)  # an error here must end the transaction: SQLite may have rolled it back
            rows = []
            for key, value in answers.items():
                raw = bytes.fromhex(key)
                rows.append((number, raw, value, digest_of(space.sha256, raw, value)))
            self._connection.executemany(
                "INSERT OR REPLACE INTO answers (space, input, value, digest) VALUES (?, ?, ?, ?)", rows
            )

    def _number(self, space: Space, *, create: bool) -> int | None:
        """The row of a space. Looked up in every transaction: another process may have pruned it."""
        if self._connection is None:
            return None
        row = self._connection.execute("SELECT id FROM spaces WHERE sha256 = ?", (space.sha256,)).fetchone()
        if row is None and create:
            values = (space.sha256, space.name, space.kind, space.content, time.time())
            self._connection.execute(
                "INSERT INTO spaces (sha256, name, kind, content, used) VALUES (?, ?, ?, ?, ?)", values
            )
            return self._number(space, create=False)
        if row is None:
            return None
        if not isinstance(row[0], int):
            raise DamagedError("an index holds no number where one was written")
        return row[0]

    def _touch(self, space: Space, number: int) -> None:
        """Say that a space is used, once per process; `prune` goes by it."""
        if self._connection is not None and self._writable and space.sha256 not in self._touched:
            self._touched.add(space.sha256)
            self._connection.execute("UPDATE spaces SET used = ? WHERE id = ?", (time.time(), number))

    # --- looking after the file

    def spaces(self) -> list[SpaceInfo]:
        """Every space with its number of answers and their bytes."""
        connection = self._opened()
        query = "SELECT space, COUNT(*), SUM(LENGTH(value)) FROM answers GROUP BY space"
        sizes = {number: (count, size) for number, count, size in connection.execute(query)}
        infos = []
        for number, row in sound_spaces(connection).items():
            space = Space(**json.loads(row.content), name=row.name)
            infos.append(SpaceInfo(space, *sizes.get(number, (0, 0)), row.used))
        return sorted(infos, key=lambda info: (info.space.name, info.space.kind, info.used))

    def size(self) -> int:
        """Bytes that the answers and what finds them take up: the file's size once nothing in it is free."""
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (int(self._opened().execute(f"PRAGMA {name}").fetchone()[0]) for name in names)
        return (pages - free) * size

    def verify(self) -> Verification:
        """Check the file's structure and every answer's digest."""
        connection = self._opened()
        problems = structure(connection)
        good = damaged = 0
        for row in rows(connection):
            good, damaged = good + row.sound, damaged + (not row.sound)
        return Verification(good + damaged, damaged, tuple(problems))

    def rebuild(self) -> int:
        """Set the file aside, and begin a new one with its sound answers; how many there are."""
        self._opened(writable=True)
        return self._begin_anew("rebuilt as asked")

    def prune(self, spaces: Iterable[str]) -> int:
        """Remove spaces, named by their sha256, and give the room back to the disk; how many answers went."""
        connection = self._opened(writable=True)
        removed = 0
        with transaction(connection):
            for sha256 in spaces:
                chosen = "(SELECT id FROM spaces WHERE sha256 = ?)"
                removed += connection.execute(f"DELETE FROM answers WHERE space = {chosen}", (sha256,)).rowcount  # noqa: S608
                connection.execute("DELETE FROM spaces WHERE sha256 = ?", (sha256,))
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def copy_to(self, other: Store, spaces: Iterable[str] | None = None) -> int:
        """Add sound answers to another store, which keeps what it has; how many were new to it."""
        return take_over(self._opened(), other._opened(writable=True), None if spaces is None else set(spaces))

    def rows(self, spaces: Iterable[str] | None = None) -> Iterator[tuple[str, str, bytes]]:
        """Space (sha256), input hash and value of every sound answer, or of those of some spaces."""
        for row in rows(self._opened(), None if spaces is None else set(spaces)):
            if row.sound:
                yield row.space, row.key.hex(), row.value

    # --- opening, damage

    def _opened(self, *, writable: bool = False) -> sqlite3.Connection:
        if self._connection is None:
            raise UserError(f"The store {self.path} cannot be opened.")
        if writable and not self._writable:
            raise UserError(f"The store {self.path} cannot be written.")
        return self._connection

    def _open(self) -> None:
        lock = Path(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            locked_before = lock.exists()
            with contextlib.ExitStack() as held:
                # SQLite opens file and WAL one after the other: between the two nobody may begin a new file. And two
                # that switch one new file to WAL at once would not wait for each other. Where a lock cannot be had,
                # neither is likely.
                with contextlib.suppress(*FILE_FAILURES):
                    held.enter_context(self._lock())
                self._opened_file = self._file_number()
                self._use(create(self.path))
                self._opened_file = self._file_number()
        except UserError:
            if not locked_before:
                lock.unlink(missing_ok=True)  # nothing stays beside somebody else's file
            raise
        except FAILURES as error:
            if error_code(error) in DAMAGE:
                self._mend(error)
            else:
                self._open_read_only(error)
        except FILE_FAILURES as error:
            self._give_up(error)

    def _lock(self) -> FileLock:
        return FileLock(f"{self.path}.lock", timeout=BUSY_SECONDS)

    def _open_read_only(self, cause: Exception) -> None:
        try:
            self._use(self._connect_read_only())
            self._writable = False
        except FAILURES:
            self._give_up(cause)
        else:
            self._warn("read-only", f"{cause}; what it holds is used, what is new is not kept")

    def _use(self, connection: sqlite3.Connection) -> None:
        # A connection holds itself and would stay open; the last to close a file takes the WAL into it.
        weakref.finalize(self, connection.close)
        self._connection = connection

    def _connect_read_only(self) -> sqlite3.Connection:
        address = self.path.resolve().as_uri()
        try:
            return checked(connect(f"{address}?mode=ro"), self.path)
        except FAILURES:
            # Without write access to the folder SQLite cannot share a WAL file; nobody else writes there either.
            return checked(connect(f"{address}?mode=ro&immutable=1"), self.path)

    def _mend(self, error: Exception) -> None:
        """Set a damaged file aside and begin a new one; stop writing after any other error."""
        if error_code(error) not in DAMAGE:
            # Room may be made while the run goes on; what else stops a write will not pass.
            self._writable = self._writable and error_code(error) in NO_ROOM
            self._warn("writing", f"{error}; the run goes on, and what it computes now is not kept")
            return
        if self._connection is not None and not self._writable:
            self._give_up(error)
            return
        try:
            self._begin_anew(str(error))
        except (*FAILURES, *FILE_FAILURES) as again:
            self._give_up(again)

    def _begin_anew(self, reason: str) -> int:
        """Set the file aside and take over what can still be read of it; how many answers that is."""
        self.close()
        with self._lock():
            aside = self._set_aside()
            self._use(create(self.path))
            self._opened_file = self._file_number()
        self._touched.clear()
        taken = 0 if aside is None else self._rescue(aside)
        if aside is not None:
            self._warn(aside.name, f"{reason}; set aside as {aside.name}, {taken} answers taken over")
        return taken

    def _set_aside(self) -> Path | None:
        """Rename the file with its WAL; None if another process has done so since this one opened it."""
        if self._file_number() != self._opened_file:
            return None
        stem = f"{self.path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        names = (self.path.with_name(f"{stem}-{number}") for number in itertools.count(1))
        aside = next(path for path in names if not path.exists())  # the second within a second, of one process
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{ending}").rename(f"{aside}{ending}")
        return aside

    def _file_number(self) -> int | None:
        return self.path.stat().st_ino if self.path.exists() else None

    def _rescue(self, aside: Path) -> int:
        """Take over what can still be read of a damaged file."""
        try:
            forget_length(aside)
            source = connect(aside)
            try:
                return take_over(source, self._opened())
            finally:
                source.close()
        except (*FAILURES, OSError) as error:  # no room: what is damaged is read over
            self._warn("rescue", f"nothing is taken over from {aside.name}: {error}")
        return 0

    def _give_up(self, error: Exception) -> None:
        self.close()
        self._warn("off", f"{error}; the run goes on without it, and nothing is kept")

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            _log.warning("store %s: %s.", self.path, message)
