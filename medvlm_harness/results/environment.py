"""lm-eval's report on the machine, made while the model works: it waits for a dozen programs, most of a second."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

__all__ = ["EarlyReport"]

AddReport = Callable[[dict[str, Any]], None]


class EarlyReport:
    """Stands in for lm-eval's `add_env_info`, which adds entries to the results; `start` has it run meanwhile."""

    def __init__(self, add: AddReport) -> None:
        self.add = add
        self._started: Future[dict[str, Any]] | None = None

    def start(self, background: Executor) -> None:
        """Have it made in the background."""
        self._started = background.submit(self._report)

    def __call__(self, storage: dict[str, Any]) -> None:
        """Add the entries: those of the report that was started, once, else of one made now."""
        started, self._started = self._started, None
        storage.update(started.result() if started else self._report())

    def _report(self) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        self.add(entries)
        return entries
