"""What may leave the machine of the data that runs were about, as their YAML declares it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from medvlm_harness.plugin import tasks_folder
from medvlm_harness.tracks.declarations import shared_as
from medvlm_harness.tracks.task_data import SHARING

__all__ = ["sharing_of"]


def sharing_of(tasks: Mapping[str, Any]) -> str:
    """What all tasks of a run permit together: the least of them, and nothing but aggregates where one says nothing.

    A results file cannot permit more of a data set that comes with a task of this package than that task does.

    Args:
        tasks: task -> what its results file says of it.
    """
    shipped = _shipped()
    said = [task["dataset"].get("sharing") for task in tasks.values()]
    said += [shipped[name] for task in tasks.values() if (name := str(task["dataset"].get("name"))) in shipped]
    return min((one if one in SHARING else SHARING[0] for one in said), key=SHARING.index, default=SHARING[0])


@cache
def _shipped() -> Mapping[str, str]:
    return shared_as(tasks_folder())
