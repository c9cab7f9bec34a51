"""Checks of task YAML before lm-eval reads it: lm-eval drops a broken file without a word.

Functions named in the YAML are not imported here: looking at a stranger's folder must not run its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from medvlm_harness.errors import UserError, near_matches

__all__ = ["TRACKS", "Summary", "check_file", "declared_names", "declared_tags", "shared_as", "summarise", "yaml_files"]

# Class named in YAML -> the keys its track reads, as "module:attribute"; each track keeps its keys beside its code.
TRACKS = {
    "ZeroShot": "medvlm_harness.tracks.zero_shot",
    "ZeroShotRobustness": "medvlm_harness.tracks.zero_shot_robustness",
    "TextZeroShotRobustness": "medvlm_harness.tracks.zero_shot_robustness",
    "RetrievalRobustness": "medvlm_harness.tracks.retrieval_robustness",
    "SummarizationRobustness": "medvlm_harness.tracks.writing_robustness",
    "ReportGenerationRobustness": "medvlm_harness.tracks.writing_robustness",
    "Retrieval": "medvlm_harness.tracks.retrieval",
    "Summarization": "medvlm_harness.tracks.summarization",
    "ReportGeneration": "medvlm_harness.tracks.report_generation",
    "ImageUseLabels": "medvlm_harness.tracks.image_use",
    "ImageUseReports": "medvlm_harness.tracks.image_use",
    "Entities": "medvlm_harness.tracks.entities",
    "RadGraphEntities": "medvlm_harness.tracks.radgraph_entities",
    "EntityProbe": "medvlm_harness.tracks.entity_probe",
    "Efficiency": "medvlm_harness.tracks.efficiency",
    "ImpressionChoice": "medvlm_harness.tracks.choice",
    "ImageProbe": "medvlm_harness.tracks.image_probe",
    "TextProbe": "medvlm_harness.tracks.text_probe",
    "TextRetrieval": "medvlm_harness.tracks.text_retrieval",
    "TextZeroShot": "medvlm_harness.tracks.text_zero_shot",
}
_STRUCTURE = {"class", "task", "task_alias", "tag", "metadata"}
_IGNORED_FOLDERS = {"__pycache__", ".ipynb_checkpoints"}


def yaml_files(folder: Path) -> Iterator[Path]:
    """The files that lm-eval indexes below a folder.

    Raises:
        UserError: if the folder is none.
    """
    if not folder.is_dir():
        raise UserError(f"Expected --include_path to be a folder with task YAML, but {folder} is not one.")
    for path in sorted(folder.glob("**/*.yaml")):
        if not _IGNORED_FOLDERS.intersection(path.parts):
            yield path


def check_file(path: Path) -> str | None:
    """Check one task or group file; its name, or None for YAML that is neither (some other tool's).

    Raises:
        UserError: if it does not parse, includes what is not there, lacks a key, or has an unknown one.
    """
    config = _load(path)
    if not {"task", "group", "class"}.intersection(config):
        _refuse_misspelt_structure(path, config)
        return None
    if "group" in config and "class" not in config:
        for key, kind, what in (("group", str, "to name the group"), ("task", list, "to list the group's tasks")):
            if not isinstance(config.get(key), kind):
                raise UserError(f"{path}: expected `{key}:` {what}, but got {config.get(key)!r}.")
        return str(config["group"])  # any further key of a group goes to its tasks, which check it
    if not isinstance(config.get("task"), str):
        raise UserError(f"{path}: expected `task:` to name the task, but got {config.get('task')!r}.")
    known = _known_keys(path, config.get("class"))
    if known is not None:
        for key in config:
            if key not in known:
                raise UserError(f"{path}: unknown key {key!r}.{near_matches(str(key), known)}")
    return str(config["task"])


def declared_names(folder: Path) -> dict[str, Path]:
    """Check every `*.yaml` below a folder; the task and group names, each with its file.

    Raises:
        UserError: naming the file, what was expected and what came; or if the folder is none.
    """
    names = {}
    for path in yaml_files(folder):
        if name := check_file(path):
            names[name] = path
    return names


def declared_tags(folder: Path) -> dict[str, list[str]]:
    """Tag -> the tasks below a folder that have it; lm-eval runs them all under that name.

    Raises:
        UserError: as `declared_names`.
    """
    tags: dict[str, list[str]] = {}
    for name, path in declared_names(folder).items():
        named = _load(path).get("tag") or []
        for tag in [named] if isinstance(named, str) else named:
            tags.setdefault(str(tag), []).append(name)
    return tags


def shared_as(folder: Path) -> dict[str, str]:
    """Data set -> the `sharing:` of the tasks below a folder; the least of them where they differ.

    Raises:
        UserError: as `declared_names`.
    """
    from medvlm_harness.tracks.task_data import SHARING

    found: dict[str, str] = {}
    for path in declared_names(folder).values():
        config = _load(path)
        if "dataset" in config:
            name, sharing = str(config["dataset"]), str(config.get("sharing", SHARING[0]))
            found[name] = min(found.get(name, sharing), sharing, key=SHARING.index)
    return found


class Summary(NamedTuple):
    """What a list of tasks says of one."""

    kind: str  # the track's class, "group", or "lm-eval" for a task without a class
    dataset: str


def summarise(path: Path) -> Summary:
    """Track and data set of a task or group file."""
    config = _load(path)
    if "group" in config and "class" not in config:
        return Summary("group", ", ".join(map(str, config.get("task", []))))
    declared_class = str(config.get("class", "lm-eval"))
    return Summary(declared_class.rpartition(".")[2], str(config.get("dataset", config.get("dataset_path", ""))))


def _load(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config: dict[str, Any] = load_yaml(path, resolve_func=False)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read {error.filename or 'it'} ({error.strerror}).") from error
    except (TypeError, ValueError) as error:  # includes that are no path, include cycles, files that hold no mapping
        raise UserError(f"{path}: {error}") from error
    return config


def _refuse_misspelt_structure(path: Path, config: Mapping[str, Any]) -> None:
    """A file without task, group and class is somebody else's, unless a key is nearly one of those."""
    for key in config:
        meant = near_matches(str(key), ("task", "group", "class"))
        if meant.startswith(" Did you") and key not in ("include", "tasks"):
            raise UserError(f"{path}: unknown key {key!r}.{meant}")


def _known_keys(path: Path, declared_class: Any) -> set[str] | None:
    """The keys a task may have; None where its class is not one of ours, which alone knows."""
    if declared_class is None:
        from lm_eval.config.task import TaskConfig

        return {field.name for field in fields(TaskConfig)} | _STRUCTURE | {"group", "task_list", "include"}
    # Unresolved, `!function medvlm_harness.ZeroShot` reads "<folder>/medvlm_harness.ZeroShot".
    module, _, name = Path(str(declared_class)).name.rpartition(".")
    if module.partition(".")[0] != "medvlm_harness":
        return None
    if name not in TRACKS:
        raise UserError(f"{path}: medvlm_harness has no task class {name!r}.{near_matches(name, TRACKS)}")
    from importlib import import_module

    keys: set[str] = getattr(import_module(TRACKS[name]), name).KEYS
    return keys | _STRUCTURE
