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
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from medvlm_harness.cache import cache_folder
from medvlm_harness.errors import UserError
from medvlm_harness.store_file import (
    DAMAGE,
    check_owner,
    connect,
    create,
    digest_of,
    error_code,
    fits,
    lengthen,
    rows,
    take_over,
    transaction,
)

__all__ = ["Answers", "Space", "SpaceInfo", "Store", "Verification", "default_path", "open_store"]

_log = logging.getLogger("lm_eval.medvlm")

ENVIRONMENT = "MEDVLM_STORE"
SUFFIX = ".sqlite"
ROWS_PER_QUERY = 500

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
    """What `medvlm store info` shows of one space."""

    sha256: str
    name: str
    kind: str
    precision: str
    answers: int
    bytes: int
    used: float  # seconds since the epoch


class Verification(NamedTuple):
    """What `medvlm store verify` found."""

    answers: int
    damaged: int
    problems: tuple[str, ...]  # as SQLite words them


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
    """One file of answers. Keep an instance to one thread; open one per process."""

    def __init__(self, path: Path) -> None:
        # A damaged file is renamed: without this rule a slip of the pen would rename somebody's weights.
        if path.suffix != SUFFIX or path.is_dir():
            raise UserError(f"Expected store to be off, or a file named *{SUFFIX}, but got {path}.")
        self.path = path
        self._touched: set[str] = set()
        self._connection: sqlite3.Connection | None = None
        self._opened_file: int | None = None  # its inode
        self._writable = True
        self._warned: set[str] = set()
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
        except sqlite3.DatabaseError as error:
            self._mend(error)
        try:
            return self._get(space, asked)
        except sqlite3.DatabaseError as error:
            self._give_up(error)
            return {}

    def put(self, space: Space, answers: Mapping[str, bytes]) -> None:
        """Keep answers, all of them or none; replaces what was there."""
        try:
            self._put(space, answers)
        except sqlite3.DatabaseError as error:
            self._mend(error)
            if error_code(error) in DAMAGE:
                with contextlib.suppress(sqlite3.DatabaseError):
                    self._put(space, answers)

    def _get(self, space: Space, asked: list[str]) -> Answers:
        number = self._number(space, create=False)
        if self._connection is None or number is None:
            return {}
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
        if space.sha256 not in self._touched and self._writable:
            self._touched.add(space.sha256)  # once per process; `prune` goes by it
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk: `put` will say so
                self._connection.execute("UPDATE spaces SET used = ? WHERE id = ?", (time.time(), row[0]))
        return int(row[0])

    # --- looking after the file

    def spaces(self) -> list[SpaceInfo]:
        """Every space with its number of answers and their bytes."""
        query = (
            "SELECT s.sha256, s.name, s.kind, s.content, COUNT(a.id), COALESCE(SUM(LENGTH(a.value)), 0), s.used "
            "FROM spaces s LEFT JOIN answers a ON a.space = s.id GROUP BY s.id ORDER BY s.name, s.kind, s.used"
        )
        return [
            SpaceInfo(sha, name, kind, str(json.loads(content)["model"].get("precision", "")), count, size, used)
            for sha, name, kind, content, count, size, used in self._opened().execute(query)
        ]

    def verify(self) -> Verification:
        """Check the file's structure and every answer's digest."""
        connection = self._opened()
        problems = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
        good = damaged = 0
        for _, sound in rows(connection):
            good, damaged = good + sound, damaged + (not sound)
        return Verification(good + damaged, damaged, tuple(problems))

    def rebuild(self) -> int:
        """Set the file aside, and begin a new one with its sound answers; how many there are."""
        self._opened()
        return self._begin_anew("rebuilt as asked")

    def prune(self, spaces: Iterable[str]) -> int:
        """Remove spaces, named by their sha256, and give the room back to the disk; how many answers went."""
        connection = self._opened()
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
        """Add answers to another store, which keeps what it has; how many were sound and copied."""
        return take_over(self._opened(), other._opened(), None if spaces is None else set(spaces))

    def rows(self, sha256: str) -> Iterator[tuple[str, bytes]]:
        """Input hash and value of every sound answer of a space."""
        query = "WHERE space = (SELECT id FROM spaces WHERE sha256 = ?)"
        for (_, key, value, _), sound in rows(self._opened(), query, (sha256,)):
            if sound:
                yield key.hex(), value

    # --- opening, damage

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise UserError(f"The store {self.path} cannot be opened.")
        return self._connection

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes that switch one new file to WAL at once would not wait for each other.
            new = not self.path.exists() or self.path.stat().st_size == 0
            with self._lock() if new else contextlib.nullcontext():
                self._opened_file = self._file_number()
                self._connection = create(self.path)
                self._opened_file = self._file_number()
        except sqlite3.DatabaseError as error:
            if error_code(error) in DAMAGE:
                self._mend(error)
            else:
                self._open_read_only(error)
        except OSError as error:
            self._give_up(error)

    def _lock(self) -> FileLock:
        return FileLock(f"{self.path}.lock")

    def _open_read_only(self, cause: sqlite3.Error) -> None:
        # Without write access to the folder SQLite cannot share a WAL file; nobody else writes there either.
        for mode in ("mode=ro", "mode=ro&immutable=1"):
            try:
                connection = connect(f"{self.path.resolve().as_uri()}?{mode}")
                check_owner(connection, self.path)
            except sqlite3.DatabaseError:
                continue
            self._connection, self._writable = connection, False
            self._warn("read-only", f"{cause}; what it holds is used, what is new is not kept")
            return
        self._give_up(cause)

    def _mend(self, error: sqlite3.DatabaseError) -> None:
        """Set a damaged file aside and begin a new one; stop writing after any other error."""
        if error_code(error) not in DAMAGE:
            # Room may be made while the run goes on; what else stops a write will not pass.
            self._writable = self._writable and error_code(error) == sqlite3.SQLITE_FULL
            self._warn("writing", f"{error}; the run goes on, and what it computes now is not kept")
            return
        if self._connection is not None and not self._writable:
            self._give_up(error)
            return
        try:
            self._begin_anew(str(error))
        except (sqlite3.DatabaseError, OSError) as again:
            self._give_up(again)

    def _begin_anew(self, reason: str) -> int:
        """Set the file aside and take over what can still be read of it; how many answers that is."""
        self.close()
        with self._lock():
            aside = self._set_aside()
            self._connection = create(self.path)
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
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{ending}").rename(f"{aside}{ending}")
        return aside

    def _file_number(self) -> int | None:
        return self.path.stat().st_ino if self.path.exists() else None

    def _rescue(self, aside: Path) -> int:
        """Take over what can still be read of a damaged file."""
        lengthen(aside)
        with contextlib.suppress(sqlite3.DatabaseError):
            source = connect(aside)
            try:
                return take_over(source, self._opened())
            finally:
                source.close()
        return 0

    def _give_up(self, error: Exception) -> None:
        self.close()
        self._warn("off", f"{error}; the run goes on without it, and nothing is kept")

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            _log.warning("store %s: %s.", self.path, message)
