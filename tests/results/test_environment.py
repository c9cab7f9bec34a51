"""The report on the machine is lm-eval's own, made once, wherever it is made."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from medvlm_harness.results.environment import EarlyReport


def test_started_early_it_is_made_elsewhere_and_once() -> None:
    threads: list[str] = []

    def add(storage: dict[str, Any]) -> None:
        threads.append(threading.current_thread().name)
        storage["made"] = len(threads)

    report = EarlyReport(add)
    with ThreadPoolExecutor(1, thread_name_prefix="background") as background:
        report.start(background)
    storage: dict[str, Any] = {"kept": True}
    report(storage)
    assert storage == {"kept": True, "made": 1}
    assert threads[0].startswith("background")
    report(storage)  # not started: made now, not handed out again
    assert storage["made"] == 2 and threads[1] == threading.current_thread().name


def test_what_goes_wrong_is_raised_where_it_is_asked_for() -> None:
    def add(storage: dict[str, Any]) -> None:
        raise RuntimeError("no such program")

    report = EarlyReport(add)
    with ThreadPoolExecutor(1) as background:
        report.start(background)
    with pytest.raises(RuntimeError, match="no such program"):
        report({})
