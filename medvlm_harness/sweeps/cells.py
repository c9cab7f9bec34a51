"""The grid of a sweep: each cell is a stock run, by a command that anyone can repeat."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.sweeps.declaration import Level, Model, Sweep

__all__ = ["Cell", "choose", "make_cells"]

# What `--model_args key=value` gives back as the text it is; everything else goes as JSON.
_PLAIN = re.compile(r"[A-Za-z_/~][\w./~:@+-]*")
_WORDS = {"true", "false", "none", "nan", "inf", "infinity"}


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One run; its key says whether two are the same."""

    name: str
    place: Mapping[str, str]  # model, axes and seed -> level
    model: str
    args: Mapping[str, Any]
    tasks: tuple[str, ...]
    arguments: tuple[str, ...]  # of `medvlm`, without --output_path
    environment: Mapping[str, str]

    @property
    def key(self) -> str:
        """Hash of what decides the cell: its arguments and environment, in 12 hexadecimal digits."""
        decides = json.dumps([self.arguments, sorted(self.environment.items())])
        return hashlib.sha256(decides.encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.key}"

    def command(self, output: Path) -> str:
        """As one types it in a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(["medvlm", *self.arguments, "--output_path", str(output)])])


def make_cells(sweep: Sweep, include_paths: Sequence[Path] = ()) -> list[Cell]:
    """All cells: the product of models, axes and seeds without what `exclude` says, and what `include` adds.

    Args:
        sweep: the declaration.
        include_paths: folders of task YAML, of the user's command line.

    Raises:
        UserError: if two axes set one option, two cells are the same or of one name, or a line of `exclude` fits none.
    """
    models = {one.name: one for one in sweep.models}
    used: set[int] = set()
    cells: list[Cell] = []
    for place in _product(sweep):
        fits = [k for k, pattern in enumerate(sweep.exclude) if _fits(pattern, place)]
        used.update(fits)
        if not fits:
            cells += _cell(sweep, models[place["model"]], place, include_paths)
    if unused := [pattern for k, pattern in enumerate(sweep.exclude) if k not in used]:
        raise UserError(f"{sweep.name}: exclude {_words(unused[0])} fits no cell.")
    for added in sweep.include:
        if "model" not in added and len(models) > 1:
            raise UserError(f"{sweep.name}: expected include {_words(added)} to name its model.")
        model = models[added.get("model", sweep.models[0].name)]
        cells += _cell(sweep, model, {"model": model.name, **added}, include_paths)
    if not cells:
        raise UserError(f"{sweep.name}: no cell is left.")
    for what in ("key", "name"):
        first: dict[str, Cell] = {}
        for cell in cells:
            other = first.setdefault(getattr(cell, what), cell)
            if other is not cell:
                raise UserError(f"{sweep.name}: {_words(other.place)} and {_words(cell.place)} are one {what}.")
    return cells


def choose(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells with one of these names or patterns; all where there is none.

    Raises:
        UserError: for one that fits no cell.
    """
    from fnmatch import fnmatchcase

    for pattern in only:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise UserError(f"No cell is called {pattern!r}.{near_matches(pattern, [cell.name for cell in cells])}")
    return [cell for cell in cells if not only or any(fnmatchcase(cell.name, pattern) for pattern in only)]


def _product(sweep: Sweep) -> Iterator[dict[str, str]]:
    axes = {
        "model": [one.name for one in sweep.models],
        **{axis: [level.name for level in levels] for axis, levels in sweep.axes.items()},
        **({"seed": [str(seed) for seed in sweep.seeds]} if sweep.seeds else {}),
    }
    for levels in itertools.product(*axes.values()):
        yield dict(zip(axes, levels, strict=True))


def _fits(pattern: Mapping[str, Sequence[str]], place: Mapping[str, str]) -> bool:
    return all(place[axis] in levels for axis, levels in pattern.items())


def _cell(sweep: Sweep, model: Model, place: Mapping[str, str], include_paths: Sequence[Path]) -> list[Cell]:
    """The cell at one place; none where the levels leave no task."""
    chosen = {axis: level for axis, levels in sweep.axes.items() for level in levels if level.name == place.get(axis)}
    args = {**model.args, **_set_by(sweep, chosen, "args")}
    args = {key: value for key, value in args.items() if value is not None}
    metadata = {**sweep.metadata, **model.metadata, **_set_by(sweep, chosen, "metadata")}
    tasks = model.tasks or sweep.tasks
    for level in chosen.values():
        tasks = tuple(task for task in tasks if level.tasks is None or task in level.tasks)
    if not tasks:
        return []
    batch_size = model.batch_size or sweep.batch_size
    arguments = ["run", "--model", model.model]
    arguments += ["--model_args", _as_option(args)] if args else []
    arguments += ["--tasks", ",".join(tasks)]
    arguments += ["--batch_size", str(batch_size)] if batch_size else []
    arguments += ["--limit", str(sweep.limit)] if sweep.limit else []
    arguments += ["--seeds", place["seed"]] if "seed" in place else []
    arguments += ["--apply_chat_template"] if model.chat_template else []
    arguments += ["--metadata", json.dumps(metadata)] if metadata else []
    for path in include_paths:
        arguments += ["--include_path", str(path)]
    named = [*(level for axis, level in place.items() if axis != "seed")]
    named += [f"seed{place['seed']}"] if len(sweep.seeds) > 1 else []
    return [Cell("-".join(named), dict(place), model.model, args, tasks, tuple(arguments), sweep.environment)]


def _set_by(sweep: Sweep, chosen: Mapping[str, Level], what: str) -> dict[str, Any]:
    """What the levels set; no option by two axes."""
    found: dict[str, Any] = {}
    setter: dict[str, str] = {}
    for axis, level in chosen.items():
        for key, value in getattr(level, what).items():
            if key in found:
                raise UserError(f"{sweep.name}: the axes {setter[key]} and {axis} both set {key}.")
            found[key], setter[key] = value, axis
    return found


def _as_option(args: Mapping[str, Any]) -> str:
    """`key=value,...` where lm-eval reads that as it is meant, else JSON."""
    plain = []
    for key, value in args.items():
        as_text = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        if not as_text and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            return json.dumps(args)
        plain.append(f"{key}={value}")
    return ",".join(plain)


def _words(place: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis}={value if isinstance(value, str) else '|'.join(value)}" for axis, value in place.items())
