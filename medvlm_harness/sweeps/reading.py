"""One mapping of a YAML: its keys known, its values of the type that is expected."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from medvlm_harness.errors import UserError, near_matches

__all__ = ["Reader"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # names become names of folders


@dataclass(frozen=True, slots=True)
class Reader:
    """A mapping, and where it stands, for errors."""

    where: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, where: str, value: Any, keys: Iterable[str]) -> Reader:
        """A mapping without other keys than these.

        Raises:
            UserError: if it is none, or has others.
        """
        known = list(keys)
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping with {', '.join(known)}, but got {value!r}.")
        for key in value:
            if key not in known:
                raise UserError(f"{where}: unknown key {key!r}.{near_matches(str(key), known)}")
        return cls(where, value)

    @staticmethod
    def refuse_name(what: str, name: Any) -> None:
        """Raise UserError unless it may be the name of a folder."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{what}: expected a name of letters, digits and . _ + -, but got {name!r}.")

    def expected(self, key: str, what: str) -> UserError:
        """What a wrong value is refused with."""
        return UserError(f"{self.where}: expected `{key}:` to be {what}, but got {self.values.get(key)!r}.")

    def get(self, key: str) -> Any:
        """As it stands; None where it does not."""
        return self.values.get(key)

    def text(self, key: str, *, default: str | None = None) -> str:
        """A text; without a default it must be there."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or (not value and default is None):
            raise self.expected(key, "a text")
        return value

    def name(self, key: str, *, default: str | None = None) -> str:
        """A text that may be the name of a folder."""
        value = self.text(key, default=default)
        self.refuse_name(f"{self.where}: {key}", value)
        return value

    def number(self, key: str, *, low: float = 0) -> int | float | None:
        """A number above `low`; None where nothing stands."""
        value = self.values.get(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value > low):
            return value
        raise self.expected(key, f"a number above {low}")

    def whole(self, key: str) -> int | None:
        """A positive whole number; None where nothing stands."""
        value = self.number(key)
        if value is None or isinstance(value, int):
            return value
        raise self.expected(key, "a positive whole number")

    def flag(self, key: str) -> bool:
        """True or false; false where nothing stands."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.expected(key, "true or false")
        return value

    def sequence(self, key: str) -> list[Any]:
        """A list; empty where nothing stands."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.expected(key, "a list")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping of names to anything; empty where nothing stands."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in value):
            raise self.expected(key, "a mapping of names")
        return dict(value)

    def inner(self, key: str, keys: Iterable[str]) -> Reader:
        """A mapping inside this one; empty where nothing stands."""
        value = self.values.get(key)
        return Reader.of(f"{self.where}: {key}", {} if value is None else value, keys)

    def mappings(self, key: str, keys: Iterable[str]) -> list[Reader]:
        """A list of mappings with these keys."""
        known = list(keys)
        return [Reader.of(f"{self.where}: {key}[{k}]", one, known) for k, one in enumerate(self.sequence(key))]
