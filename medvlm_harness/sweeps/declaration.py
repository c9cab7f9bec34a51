"""What a sweep declares: one YAML, read into frozen dataclasses; nothing in it is executed.

A sweep may come from a stranger. It names tasks and models that are installed, and their options; it cannot name a
folder of task files, a shell command, or an environment variable that loads code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.sweeps.executor import Executor, read_executor
from medvlm_harness.sweeps.reading import Reader

__all__ = ["Comparison", "Level", "Model", "Sweep", "find_sweep", "placeholders", "read_sweep", "shipped_sweeps"]

# Only what changes speed or which device is used: LD_PRELOAD, PYTHONPATH and their like would run code.
ENVIRONMENT = ("*_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "MEDVLM_DATA")
# What a user must decide himself, for one run at a time: to run a model's code, and to send data to a server.
THE_USERS = ("trust_remote_code", "allow_remote")
_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")  # the second is what stands for it else


@dataclass(frozen=True, slots=True)
class Level:
    """One value of an axis: the options and metadata that it sets; an option that is None is not given.

    `tasks`, where a level names them, are the ones of its cells: of those that the model has.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model of lm-eval's registry, with its options and what its runs have of their own."""

    name: str
    model: str
    args: Mapping[str, Any]
    tasks: tuple[str, ...] | None  # None: those of the sweep
    metadata: Mapping[str, Any]
    batch_size: int | str | None
    chat_template: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the cells are compared in the end."""

    # Each is axis -> level: a cell is compared with the one that has these levels and is the same in all else.
    references: tuple[Mapping[str, str], ...]
    accuracy: str | None  # "task:metric" of the trade-off; None for none


@dataclass(frozen=True, slots=True)
class Sweep:
    """A grid of runs, and how they are executed."""

    name: str
    summary: str
    tasks: tuple[str, ...]
    models: tuple[Model, ...]
    axes: Mapping[str, tuple[Level, ...]]
    include: tuple[Mapping[str, str], ...]
    exclude: tuple[Mapping[str, tuple[str, ...]], ...]
    seeds: tuple[int, ...]
    metadata: Mapping[str, Any]
    batch_size: int | str | None
    limit: int | float | None
    environment: Mapping[str, str]
    executor: Executor
    compare: Comparison


def shipped_sweeps() -> dict[str, Path]:
    """Name -> file of the sweeps that the package brings."""
    folder = Path(str(files("medvlm_harness.sweeps"))) / "shipped"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_sweep(name: str) -> Path:
    """The file of a shipped sweep, or a file of the user's.

    Raises:
        UserError: if it is neither.
    """
    shipped = shipped_sweeps()
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"Expected a YAML file or a shipped sweep, but got {name!r}.{near_matches(name, shipped)}")


def read_sweep(path: Path, values: Mapping[str, str]) -> Sweep:
    """Read a sweep and fill its placeholders, `${NAME}` or with a default `${NAME:-what}`.

    Args:
        path: YAML.
        values: placeholder -> what stands for it; text it stays, whatever it holds.

    Raises:
        UserError: for an unknown key, a wrong value, or a placeholder without a value: all of them in one line.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    filled = _fill(path, raw, values)
    top = Reader.of(path.name, filled, Sweep.__dataclass_fields__)
    tasks = _tasks(top)
    models = tuple(_model(one) for one in top.mappings("models", Model.__dataclass_fields__))
    if not models:
        raise top.expected("models", "a list of models, each with `model:` and `args:`")
    axes = {axis: _levels(top, axis, levels) for axis, levels in top.mapping("axes").items()}
    if reserved := axes.keys() & {"model", "seed"}:
        raise UserError(f"{top.where}: {min(reserved)} cannot be an axis: see `{min(reserved)}s:`.")
    names = {"model": [one.name for one in models], **{axis: [one.name for one in axes[axis]] for axis in axes}}
    for what, found in names.items():
        _refuse_twice(f"{top.where}: {what}", found)
    chosen = tuple(_seed(top, one) for one in top.sequence("seeds"))
    _refuse_twice(f"{top.where}: seeds", chosen)
    places = {**names, **({"seed": [str(seed) for seed in chosen]} if chosen else {})}
    sweep = Sweep(
        name=top.name("name"),
        summary=top.text("summary", default=""),
        tasks=tasks,
        models=models,
        axes=axes,
        include=tuple(_one_place(top, one, places) for one in top.sequence("include")),
        exclude=tuple(_places(top, "exclude", one, places) for one in top.sequence("exclude")),
        seeds=chosen,
        metadata=_given(top, "metadata"),
        batch_size=_batch_size(top),
        limit=top.number("limit"),
        environment=_environment(top),
        executor=read_executor(top),
        compare=_comparison(top, places),
    )
    for model in models:
        if not (sweep.tasks or model.tasks):
            raise UserError(f"{top.where}: expected `tasks:` of the sweep or of model {model.name}.")
    return sweep


def _fill(path: Path, raw: Any, values: Mapping[str, str]) -> Any:
    """All strings of the YAML with their placeholders replaced, once: what is put in is not looked at again."""
    used = placeholders(raw)
    if missing := sorted(name for name, needed in used.items() if needed and name not in values):
        options = " ".join(f"--set {name}=..." for name in missing)
        raise UserError(f"{path.name} needs {len(missing)} more value{'s' * (len(missing) > 1)}: {options}")
    for name in values:
        if name not in used:
            raise UserError(f"{path.name} has no placeholder ${{{name}}} for --set {name}.{near_matches(name, used)}")

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[2] or ""), value)
        if isinstance(value, Mapping):
            return {key: fill(one) for key, one in value.items()}
        return [fill(one) for one in value] if isinstance(value, list) else value

    return fill(raw)


def placeholders(value: Any) -> dict[str, bool]:
    """The names of all placeholders in what YAML gave, and whether they need a value: some have a default."""
    found: dict[str, bool] = {}
    if isinstance(value, str):
        for match in _PLACEHOLDER.finditer(value):
            found[match[1]] = found.get(match[1], False) or match[2] is None
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            for name, needed in placeholders(one).items():
                found[name] = found.get(name, False) or needed
    return found


def _tasks(reader: Reader) -> tuple[str, ...]:
    tasks = reader.sequence("tasks")
    for task in tasks:
        # A path would name a stranger's task file, whose functions lm-eval runs.
        if not isinstance(task, str) or not re.fullmatch(r"[\w*?\[\].-]+", task) or task.endswith((".yaml", ".yml")):
            raise reader.expected("tasks", "a list of names of tasks (folders come by --include-path)")
    _refuse_twice(f"{reader.where}: tasks", tasks)
    return tuple(tasks)


def _model(reader: Reader) -> Model:
    model = reader.text("model")
    return Model(
        name=reader.name("name", default=model),
        model=model,
        args=_given(reader, "args"),
        tasks=_tasks(reader) or None,
        metadata=_given(reader, "metadata"),
        batch_size=_batch_size(reader),
        chat_template=reader.flag("chat_template"),
    )


def _levels(top: Reader, axis: str, levels: Any) -> tuple[Level, ...]:
    """`[a, b]` are values of the option called as the axis; `{name: {args, metadata, tasks}}` says what is set."""
    Reader.refuse_name(f"{top.where}: axis", axis)
    if isinstance(levels, list) and levels:
        if all(one is None or isinstance(one, str | int | float) for one in levels):
            return tuple(Level(_level_name(top, axis, one), {axis: one}) for one in levels)
    elif isinstance(levels, Mapping) and levels:
        found = []
        for name, level in levels.items():
            inner = Reader.of(f"{top.where}: {axis}: {name}", level or {}, ("args", "metadata", "tasks"))
            given = _given(inner, "args"), _given(inner, "metadata"), _tasks(inner) or None
            found.append(Level(_level_name(top, axis, name), *given))
        return tuple(found)
    raise UserError(
        f"{top.where}: expected axis {axis} to be a list of values of the option {axis}, "
        f"or a mapping of names to {{args, metadata, tasks}}, but got {levels!r}."
    )


def _level_name(top: Reader, axis: str, value: Any) -> str:
    """A word stands for itself; a number or a switch, which says nothing alone, behind the name of its axis."""
    if value is None:
        return f"no-{axis}"
    name = value if isinstance(value, str) and re.search(r"[^\W\d]", value) else f"{axis}{value}"
    Reader.refuse_name(f"{top.where}: level of {axis}", name)
    return name


def _given(reader: Reader, key: str) -> dict[str, Any]:
    found = reader.mapping(key)
    for one in THE_USERS:
        if found.get(one) not in (None, False):
            raise UserError(
                f"{reader.where}: a sweep may not say {one}: that is for you to decide, run by run (`medvlm run`)."
            )
    return found


def _batch_size(reader: Reader) -> int | str | None:
    value = reader.get("batch_size")
    if value is None or value == "auto":
        return None if value is None else "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise reader.expected("batch_size", "a positive whole number, or auto")


def _seed(reader: Reader, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise reader.expected("seeds", "a list of whole numbers from 0 on")


def _environment(reader: Reader) -> dict[str, str]:
    found = reader.mapping("environment")
    for name, value in found.items():
        if not any(fnmatchcase(name, pattern) for pattern in ENVIRONMENT):
            raise UserError(f"{reader.where}: a sweep may not set {name}; it may set {', '.join(ENVIRONMENT)}.")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UserError(f"{reader.where}: expected a text or a whole number for {name}, but got {value!r}.")
    return {name: str(value) for name, value in found.items()}


def _comparison(top: Reader, places: Mapping[str, Sequence[str]]) -> Comparison:
    reader = top.inner("compare", Comparison.__dataclass_fields__)
    return Comparison(
        references=tuple(_one_place(reader, one, places) for one in reader.sequence("references")),
        accuracy=reader.text("accuracy", default="") or None,
    )


def _one_place(reader: Reader, given: Any, places: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found = _places(reader, "a place", given, places)
    if several := [axis for axis, levels in found.items() if len(levels) > 1]:
        raise UserError(f"{reader.where}: expected one level of {several[0]}, but got {', '.join(found[several[0]])}.")
    return {axis: levels[0] for axis, levels in found.items()}


def _places(
    reader: Reader, what: str, given: Any, places: Mapping[str, Sequence[str]]
) -> Mapping[str, tuple[str, ...]]:
    """Axis -> levels, one or a list, by the names that they have in cells or as they are written."""
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{reader.where}: expected {what} to be a mapping of axes to levels, but got {given!r}.")
    found = {}
    for axis, levels in given.items():
        if axis not in places:
            raise UserError(f"{reader.where}: unknown axis {axis!r}.{near_matches(str(axis), places)}")
        known, chosen = places[axis], []
        for level in levels if isinstance(levels, list) else [levels]:
            spelt = (f"no-{axis}",) if level is None else (str(level), f"{axis}{level}")
            match = next((one for one in spelt if one in known), None)
            if match is None:
                raise UserError(f"{reader.where}: {axis} has no level {level!r}.{near_matches(str(level), known)}")
            chosen.append(match)
        found[str(axis)] = tuple(chosen)
    return found


def _refuse_twice(what: str, found: Sequence[Any]) -> None:
    for one in found:
        if found.count(one) > 1:
            raise UserError(f"{what}: {one} stands there twice.")
