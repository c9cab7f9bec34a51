"""The same run again from its results file, and what came out otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.results.redaction import is_redacted
from medvlm_harness.results.run_cost import EFFICIENCY
from medvlm_harness.results.run_files import RunFiles

__all__ = [
    "ELSEWHERE",
    "Call",
    "MetricDifference",
    "Reproduction",
    "call_of",
    "compare",
    "other_inputs",
    "parse_options",
    "run_again",
]

ELSEWHERE = 0.005
"""How far metrics may differ by default where machine or versions do: a pair that swaps its order moves an AUROC or a
recall by one part of their support. On the same machine, with the same versions, they must be equal."""
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
DEFAULT_DEVICE = "cuda:0"  # lm-eval's own, which it writes down where nothing was asked
# What of a task must be as it was for its numbers to be.
DECLARED = ("version", "split", "documents", "scored", "perturbation", "label_set", "label_source", "uncertain")


@dataclass(frozen=True)
class Call:
    """One command line of `medvlm run` or `lm_eval run`.

    Attributes:
        module: what `python -m` runs.
        model: --model.
        model_args: its options.
        metadata: --metadata.
        tasks: names.
        include_paths: folders with tasks of the user.
        further: all other arguments.
        notes: what the file does not say.
    """

    module: str
    model: str
    model_args: Mapping[str, Any]
    metadata: Mapping[str, Any]
    tasks: Sequence[str]
    include_paths: Sequence[str]
    further: Sequence[str]
    notes: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """Program and arguments, without an output path."""
        options = ["--model", self.model]
        options += ["--model_args", json.dumps(dict(self.model_args))] if self.model_args else []
        options += ["--tasks", ",".join(self.tasks)]
        options += ["--metadata", json.dumps(dict(self.metadata))] if self.metadata else []
        for path in self.include_paths:
            options += ["--include_path", path]
        return [sys.executable, "-m", self.module, "run", *options, *self.further]


def call_of(
    run: RunFiles,
    *,
    model_args: Mapping[str, Any],
    metadata: Mapping[str, Any],
    include_paths: Sequence[str],
) -> Call:
    """The command line that a results file is of.

    Args:
        run: the run.
        model_args: options of the model in place of those of the file.
        metadata: likewise of --metadata.
        include_paths: in place of the file's.

    Raises:
        UserError: naming all that was taken out of the file and is not given, with the hashes that are expected.
    """
    config, block = run.results.get("config") or {}, run.medvlm
    if not config.get("model"):
        raise UserError(f"{run.path} does not say the model's name (config.model): nothing can be run again.")
    asked: Mapping[str, Any] = block.get("asked") or {}
    options = {**_options(config.get("model_args")), **model_args}
    told = {**asked.get("metadata", {}), **metadata}
    notes = [] if asked else ["the file is of version 1, which does not say what --metadata was"]
    if is_redacted(told.get("data_dir")):  # data have hashes: they may be found wherever tasks look
        notes.append(f"--metadata data_dir was {told.pop('data_dir')}: data are looked for in the usual places")
    paths = list(include_paths or asked.get("include_path", ()))
    weights = block["model"].get("weights_sha256")
    lacking = [
        *(f"--model-args {name}=... ({value})" for name, value in options.items() if is_redacted(value)),
        *(f"--metadata {name}=... ({value})" for name, value in told.items() if is_redacted(value)),
        *(f"--include-path ... ({path})" for path in paths if is_redacted(path)),
    ]
    if lacking:
        expected = f" The weights' sha256 is {weights}." if weights else ""
        raise UserError(f"{run.path.name} does not hold paths and secrets; give {', '.join(lacking)}.{expected}")
    named = asked.get("tasks") or run.results.get("configs") or block["tasks"]
    tasks = [task for task in named if task not in block.get("unsupported", {})]
    ours = set(tasks) <= set(block["tasks"])
    return Call(
        "medvlm_harness" if ours else "lm_eval",
        config["model"],
        options,
        told,
        tasks,
        paths,
        list(_further(run.results, config, asked)),
        notes,
    )


def _options(text: Any) -> dict[str, Any]:
    """--model_args as earlier versions of lm-eval wrote them, too: `name=value,...`."""
    if isinstance(text, str):
        from lm_eval.utils import simple_parse_args_string

        return dict(simple_parse_args_string(text))
    return dict(text or {})


def _further(results: Mapping[str, Any], config: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    if config.get("limit") is not None:
        yield from ("--limit", str(config["limit"]))
    if asked.get("samples"):
        yield from ("--samples", json.dumps(asked["samples"]))
    if isinstance(config.get("batch_size"), str):  # the integer is lm-eval's own default
        yield from ("--batch_size", config["batch_size"])
    if config.get("device") not in (None, DEFAULT_DEVICE):
        yield from ("--device", str(config["device"]))
    if any(config.get(seed) is not None for seed in SEEDS):
        yield from ("--seed", ",".join(str(config.get(seed)) for seed in SEEDS))
    if generation := _options(config.get("gen_kwargs")):
        yield from ("--gen_kwargs", json.dumps(generation))
    if template := asked.get("apply_chat_template"):
        yield from ("--apply_chat_template", *([template] if isinstance(template, str) else []))
    if results.get("system_instruction"):
        yield from ("--system_instruction", results["system_instruction"])


def other_inputs(run: RunFiles, call: Call) -> list[str]:
    """Weights and data that have other hashes than the run's, one line each; known before anything is computed.

    Raises:
        UserError: if the model's options, or the data, are not right.
    """
    from medvlm_harness import plugin

    plugin.scope.builtin_tasks = call.module == "lm_eval"
    plugin.scope.include_paths = tuple(Path(path) for path in call.include_paths)
    plugin.install()
    import lm_eval.models  # noqa: F401  # fills the registry
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    found = []
    backend: Any = get_model(call.model)
    expected = run.medvlm["model"].get("weights_sha256")
    if expected is not None and hasattr(backend, "options"):
        lm = backend.create_from_arg_obj(dict(call.model_args), {"device": "cpu"})
        if (weights := lm.weights_sha256) != expected:
            found.append(f"the weights have sha256 {weights}, not {expected}")
    manager = TaskManager(metadata={**call.model_args, **call.metadata})
    for name, task in manager.load(list(call.tasks))["tasks"].items():
        if name in run.tasks and getattr(task, "is_medvlm", False):
            expected = run.tasks[name]["dataset"].get("sha256")
            if task.data.sha256 != expected:
                found.append(f"the data of {name} have sha256 {task.data.sha256}, not {expected}")
    return found


def run_again(call: Call, output: Path, environment: Mapping[str, str]) -> Path:
    """Run it in a process of its own, whose messages go on to stderr.

    Returns:
        The new results file.

    Raises:
        UserError: if the run fails.
    """
    command = [*call.arguments(), "--output_path", str(output)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=dict(environment), check=False)
    written = sorted(output.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if done.returncode or not written:
        raise UserError(
            f"The run ended with exit status {done.returncode} and without results: see its messages above."
        )
    return written[-1]


@dataclass(frozen=True)
class MetricDifference:
    """One metric of both runs; `difference` is the largest of value and interval, null where it has none."""

    task: str
    metric: str
    before: float | None
    now: float | None
    difference: float | None
    same: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Reproduction:
    """What came out otherwise.

    Attributes:
        tolerance: up to which metrics count as the same.
        metrics: all that both could have; costs are measured anew and not among them.
        around: versions, machine and declarations that differ, one line each.
        unreproduced: tasks that the new run lacks, with the reason.
    """

    tolerance: float
    metrics: Sequence[MetricDifference]
    around: Sequence[str] = field(default_factory=tuple)
    unreproduced: Mapping[str, str] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether every metric of every task came out again."""
        return not self.unreproduced and all(one.same for one in self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "same": self.same,
            "tolerance": self.tolerance,
            "metrics": [one.to_dict() for one in self.metrics],
            "around": list(self.around),
            "unreproduced": dict(self.unreproduced),
        }


def compare(before: RunFiles, now: RunFiles, *, tolerance: float | None = None) -> Reproduction:
    """All metrics of a run against those of its repetition.

    Args:
        before: the run.
        now: its repetition.
        tolerance: largest difference of a value or an end of its interval; None for 0 on the same machine with the
            same versions and as many answers from the store, else `ELSEWHERE`.
    """
    around = [*_differing("version of ", before.medvlm.get("versions"), now.medvlm.get("versions"))]
    costs = [run.medvlm.get("efficiency") or {} for run in (before, now)]
    around += _differing("machine: ", *(cost.get("hardware") for cost in costs))
    around += _differing("", *({"processes": cost.get("processes")} for cost in costs))
    around += _differing("", *({"answers from the store": _recalled(run)} for run in (before, now)))
    allowed = (ELSEWHERE if around else 0.0) if tolerance is None else tolerance
    metrics: list[MetricDifference] = []
    lacking: dict[str, str] = {}
    for task, details in before.tasks.items():
        if task not in now.tasks:
            lacking[task] = str(now.medvlm.get("unsupported", {}).get(task, "it did not run"))
            continue
        again = now.tasks[task]
        around += _differing(f"{task}: ", *({key: one.get(key) for key in DECLARED} for one in (details, again)))
        if not task.endswith(EFFICIENCY):
            metrics += _metrics(task, details["metrics"], again["metrics"], allowed)
    return Reproduction(allowed, metrics, around, lacking)


def _differing(what: str, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    before, now = before or {}, now or {}
    keys = [*before, *(key for key in now if key not in before)]
    return [f"{what}{key} {now.get(key)}, before {before.get(key)}" for key in keys if before.get(key) != now.get(key)]


def _recalled(run: RunFiles) -> int:
    """Answers that a run took from the store: computed in other batches, they differ in their last digits."""
    return sum(count for key, count in run.medvlm["model"].items() if key.endswith("_recalled"))


def _metrics(
    task: str, before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float
) -> Iterator[MetricDifference]:
    for name in dict.fromkeys((*before, *now)):
        old, new = _numbers(before.get(name)), _numbers(now.get(name))
        apart = [abs(a - b) for a, b in zip(old, new, strict=True) if a is not None and b is not None]
        both = (name in before) == (name in now)
        defined = [one is None for one in old] == [one is None for one in new]
        difference = max(apart, default=None)
        same = both and defined and (difference is None or difference <= tolerance)
        yield MetricDifference(task, name, old[0], new[0], difference, same)


def _numbers(estimate: Mapping[str, Any] | None) -> list[float | None]:
    if estimate is None:
        return [None, None, None]
    return [estimate["value"], *(estimate["ci95"] or (None, None))]


def parse_options(text: str | None, option: str) -> dict[str, Any]:
    """`name=value,...` or a JSON object, as lm-eval takes them.

    Raises:
        UserError: if it is neither.
    """
    if not text:
        return {}
    expected = f"Expected {option} to be name=value,... or JSON, but got {text!r}"
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise UserError(f"{expected}: {first_line(error)}") from error
    if not all(part.partition("=")[1] for part in text.split(",")):
        raise UserError(f"{expected}.")
    return _options(text)
