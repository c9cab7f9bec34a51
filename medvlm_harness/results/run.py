"""What our tasks and models add to an lm-eval run: refusals before it, details and scores after it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from medvlm_harness import plugin
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.plugin import scope
from medvlm_harness.requests import capabilities_of
from medvlm_harness.results.efficiency import Stopwatch, efficiency_block
from medvlm_harness.results.environment import EarlyReport
from medvlm_harness.results.remote import refuse_hub_push, refuse_remote
from medvlm_harness.tracks.contamination import refuse_contaminated, trained_splits

__all__ = ["SCHEMA_VERSION", "MedvlmResults", "evaluate_with_details", "installed_versions", "unsupported_reason"]

SCHEMA_VERSION = 2
VERSIONS = ("medvlm-harness", "lm_eval", "torch", "transformers", "open_clip_torch", "numpy")
# Of a model's description; each process counts its own.
ADDED_UP = (
    *("images_encoded", "images_recalled", "texts_encoded", "texts_recalled"),
    *("images_classified", "classifications_recalled"),
    *("generated", "generations_recalled", "generations_unfinished", "scored", "scores_recalled", "prompts_cut"),
)
# What a model of somebody else's can do is known by its methods; a task of somebody else's needs its output type.
STOCK_REQUESTS = {"multiple_choice": "loglikelihood"}


class MedvlmResults(dict[str, Any]):
    """lm-eval's results, with the scores that are written beside them but never into them."""

    scores: list[dict[str, Any]]


def evaluate_with_details(
    evaluate: Callable[..., Any], report: EarlyReport, lm: Any, task_dict: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Run lm-eval's `evaluate` on what the model can do; a run without ours passes through untouched.

    Once nothing is refused any more, what can go on while requests are made is begun in a thread: what the model has
    for it, then the report on the machine.

    Raises:
        UserError: if nothing asked for is supported, a split is contaminated, data would go where it may not,
            --metadata has an unknown key, or processes differ in what they have.
    """
    if "tasks" not in task_dict:  # the nested form of lm-eval's older API
        from lm_eval.evaluator_utils import _handle_back_comp

        groups, flat = _handle_back_comp(task_dict)
        task_dict = {"tasks": flat, "groups": groups}
    tasks: dict[str, Any] = task_dict["tasks"]
    ours = {name: task for name, task in tasks.items() if getattr(task, "is_medvlm", False)}
    if not ours and not hasattr(lm, "CAPABILITIES"):
        return evaluate(lm, task_dict, *args, **kwargs)
    if ours and kwargs.get("cache_requests"):
        raise UserError("--cache_requests keeps requests whatever data they came from: leave it out for these tasks.")
    refused = {name: reason for name, task in tasks.items() if (reason := unsupported_reason(lm, task)) is not None}
    if tasks and len(refused) == len(tasks):
        raise UserError("The model can do none of the tasks: " + "; ".join(f"{k}: {v}" for k, v in refused.items()))
    running = {name: task for name, task in ours.items() if name not in refused}
    loggers = plugin.scope.sample_loggers if kwargs.get("log_samples") else ()
    refuse_hub_push(running.values(), (*plugin.scope.hub_pushes, *loggers))
    _refuse_unknown_metadata(ours.values(), lm)
    for task in running.values():
        task.prepare_for(lm)
    contamination = {name: _check(task, lm) for name, task in running.items()}
    remote = {name: refuse_remote(task, lm) for name, task in running.items()}
    supported = {name: task for name, task in tasks.items() if name not in refused}
    data = {f"data of {name}": task.data.sha256 for name, task in running.items()}
    common = {**data, "precision": getattr(lm, "precision", None), "versions": installed_versions()}
    _refuse_unequal(_gathered(lm, common) or [])
    background = ThreadPoolExecutor(1, thread_name_prefix="background")
    if hasattr(lm, "begin"):
        lm.begin(background)
    if getattr(lm, "rank", 0) == 0:
        report.start(background)
    background.shutdown(wait=False)
    stopwatch = Stopwatch()
    with _apart(lm):
        results = evaluate(lm, {**task_dict, "tasks": supported}, *args, **kwargs)
    costs = _gathered(lm, stopwatch.read(lm))
    model = _describe(lm)
    if results is None or model is None or costs is None:  # not the first process
        return None
    full = MedvlmResults(results)
    if getattr(lm, "world_size", 1) > 1 and "samples" in full:
        full["samples"] |= {name: task.as_one_process(full["samples"][name]) for name, task in running.items()}
    for name, task in running.items():  # lm-eval also counts documents that a probe learns from
        full["n-samples"][name] = {**full["n-samples"][name], "effective": len(task.rows)}
        full["results"][name]["sample_len"] = len(task.rows)
    for name, reason in refused.items():
        _add_refused(full, name, tasks[name], reason)
    full["medvlm"] = {
        "schema_version": SCHEMA_VERSION,
        "versions": installed_versions(),
        "asked": _asked(tasks, kwargs),
        "model": model,
        "efficiency": efficiency_block(costs),
        "tasks": {name: _details(task, contamination[name], remote[name]) for name, task in running.items()},
        "unsupported": refused,
    }
    full.scores = [record for task in running.values() for record in task.score_records(task.rows)]
    return full


def _asked(tasks: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What of the command line lm-eval does not write down; the plug-in redacts it."""
    metadata = {key: value for task in tasks.values() for key, value in getattr(task, "runtime", {}).items()}
    samples = options.get("samples")
    return {
        "tasks": list(tasks),
        "metadata": dict(sorted(metadata.items())),
        "samples": None if samples is None else {name: list(numbers) for name, numbers in samples.items()},
        "apply_chat_template": options.get("apply_chat_template", False),
        "include_path": [str(path) for path in scope.indexed],
    }


@contextmanager
def _apart(lm: Any) -> Iterator[None]:
    """Lm-eval's own multimodal backends take requests with images or without, by the first one of a call.

    The requests of all tasks come in one call: here those with images and those without become calls of their own.
    """
    if hasattr(lm, "CAPABILITIES") or not getattr(lm, "MULTIMODAL", False):
        yield
        return
    generate = lm.generate_until

    def in_groups(requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
        groups: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(len(request.args), []).append(place)
        answers: dict[int, Any] = {}
        for places in groups.values():
            answers |= zip(places, generate([requests[place] for place in places], *args, **kwargs), strict=True)
        return [answers[place] for place in range(len(requests))]

    lm.generate_until = in_groups
    try:
        yield
    finally:
        lm.generate_until = generate


def unsupported_reason(lm: Any, task: Any) -> str | None:
    """Why a model cannot do a task; None if it can, as far as can be known before asking."""
    if getattr(task, "is_medvlm", False):
        needs = set(task.needs(lm))
    else:
        output_type = str(getattr(task, "OUTPUT_TYPE", ""))
        needs = {STOCK_REQUESTS.get(output_type, output_type)}
    capabilities, lacks = capabilities_of(lm), getattr(lm, "lacks", {})
    name = getattr(getattr(lm, "card", None), "name", type(lm).__name__)
    if getattr(task, "MULTIMODAL", False) and not getattr(lm, "MULTIMODAL", False):
        return f"{name} cannot take images"  # lm-eval itself ends the whole run
    if capabilities is None:
        missing = {need for need in needs if not hasattr(lm, need.partition(":")[0])}
    else:
        missing = needs - capabilities
    if not missing:
        refused = task.refuses(lm) if getattr(task, "is_medvlm", False) else None
        return refused or _lacks_floor(name, lm, task) or _refused_labels(name, lm, task)
    reasons = "".join(f": {lacks[need]}" for need in sorted(missing) if need in lacks)
    return f"{name} cannot {' and '.join(map(_in_words, sorted(missing)))}{reasons}"


def _lacks_floor(name: str, lm: Any, task: Any) -> str | None:
    """Why a model that answers by a floor's text cannot do a task that has no such floor; None if it can."""
    floor, floors = getattr(lm, "floor", None), getattr(task, "FLOORS", None)
    if floor is None or floors is None or floor in floors:
        return None
    return f"{name} answers by the floor {floor}, but the task has {', '.join(sorted(floors)) or 'none'}"


def _refused_labels(name: str, lm: Any, task: Any) -> str | None:
    """Why a model cannot score a task's labels; None if it can, or there are none."""
    label_set = getattr(task, "label_set", None)
    reason = lm.refuses(label_set) if label_set is not None and hasattr(lm, "refuses") else None
    return None if reason is None else f"{name} cannot score the labels: {reason}"


def _in_words(capability: str) -> str:
    """`embed:image` as "embed images", `loglikelihood` as "answer loglikelihood requests"."""
    request, _, kind = capability.partition(":")
    return f"{request} {kind}s" if kind else f"answer {request} requests"


def _refuse_unknown_metadata(tasks: Iterable[Any], lm: Any) -> None:
    """Refuse a --metadata key that no task of the run reads; one of them alone may (`gold` of the entities)."""
    if not hasattr(lm, "options"):
        return
    tasks = list(tasks)
    known = frozenset().union(*(task.RUNTIME_KEYS for task in tasks))
    for task in tasks:
        for key in sorted(task.metadata_keys - known - lm.options()):
            raise UserError(f"{task.task_name}: unknown key {key!r} in --metadata.{near_matches(key, known)}")


def _check(task: Any, lm: Any) -> dict[str, Any]:
    """Refuse contaminated splits; what is known of contamination otherwise."""
    card = getattr(lm, "card", None)
    trained_on = getattr(card, "trained_on", None)
    if trained_on is None:
        return {"trained_on": None, "splits_seen": None, "note": "nothing is known of this model's training data"}
    names = (task.declared["dataset"], *task.declared.get("aliases", ()))
    scheme = task.data.manifest.policies.get("split_scheme")
    seen = trained_splits(trained_on, names=names, split_scheme=scheme)
    allowed = bool(task.runtime.get("allow_contaminated", False))
    refuse_contaminated(task.task_name, task.splits, seen, model=getattr(card, "name", "the model"), allowed=allowed)
    contaminated = sorted(seen.intersection(task.splits))
    notes = [f"scored on {', '.join(contaminated)}, which it was trained on"] if contaminated else []
    if getattr(task, "fits_on", None) in seen and any(task.fitting_counts().values()):
        notes.append(f"what was fitted on {task.fits_on} is optimistic, for it was trained on that split too")
    return {"trained_on": list(trained_on), "splits_seen": sorted(seen), "note": "; ".join(notes) or None}


def _details(task: Any, contamination: Mapping[str, Any], remote: str | None) -> dict[str, Any]:
    return {
        **task.details(),
        "contamination": dict(contamination),
        "remote": remote,
        "metrics": {name: estimate.to_dict() for name, estimate in task.all_estimates().items()},
    }


def _describe(lm: Any) -> dict[str, Any] | None:
    """What the model says of itself, with what all processes did; None on all but the first."""
    own = lm.describe() if hasattr(lm, "describe") else {"class": type(lm).__name__, "card": None}
    described = _gathered(lm, own)
    if described is None:
        return None
    _refuse_unequal([{"weights": one.get("weights_sha256")} for one in described])
    summed = {key: sum(one[key] for one in described) for key in ADDED_UP if key in own}
    return {**own, **summed, "world_size": len(described)}


def _gathered(lm: Any, own: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What every process gives, by rank; None on all but the first."""
    if getattr(lm, "world_size", 1) == 1:
        return [own]
    gathered: list[dict[str, Any]] | None = lm.gather_object(own)
    return gathered


def _refuse_unequal(everyone: Sequence[Mapping[str, Any]]) -> None:
    """Machines of one run have files and packages of their own, which must be the same ones.

    Raises:
        UserError: naming the first difference.
    """
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise UserError(
                    f"Process {rank} has other {name} than process 0: {other[name]}, not {value}. "
                    "All processes of a run need the same."
                )


def _add_refused(results: dict[str, Any], name: str, task: Any, reason: str) -> None:
    """A row that says why, and the entries that lm-eval's command line looks up for every task."""
    results["results"][name] = {"name": name, "alias": name, "sample_len": 0, "unsupported,none": reason}
    results["configs"][name] = task.dump_config()
    results["versions"][name] = task.VERSION
    results["n-shot"][name] = 0
    results["higher_is_better"][name] = {}
    results["n-samples"][name] = {"original": 0, "effective": 0}
    if "samples" in results:
        results["samples"][name] = []


def installed_versions() -> dict[str, str | None]:
    """Version of Python and of the packages that numbers depend on; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
