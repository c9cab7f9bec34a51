"""A methods paragraph for a paper, and the table behind it, written from what runs recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medvlm_harness.results.primary import primary_metric
from medvlm_harness.results.report.parts import Cell, Column, Section, Table
from medvlm_harness.results.report.runs import ReportRuns, model_name, option_name
from medvlm_harness.results.report.shown import metric_title
from medvlm_harness.results.run_cost import EFFICIENCY

__all__ = ["methods", "methods_section"]

SOFTWARE = {
    "medvlm-harness": "medvlm-harness",
    "lm_eval": "lm-evaluation-harness",
    "torch": "PyTorch",
    "transformers": "Transformers",
    "open_clip_torch": "OpenCLIP",
    "numpy": "NumPy",
    "python": "Python",
}
INTERVALS = {
    "bootstrap over studies": "a percentile bootstrap over studies (1,000 resamples, seed 0)",
    "Newcombe": "for the AUROC of single labels, Newcombe's method 5 scaled by the DeLong variance over studies",
    "Wilson": "Wilson's method where all resamples agree",
}


def methods(runs: ReportRuns) -> list[str]:
    """Sentences on models, data, truth, metrics, intervals and software, one paragraph each; only what is recorded."""
    return [paragraph for write in (_models, _data, _truth, _metrics, _cost, _software) if (paragraph := write(runs))]


def methods_section(runs: ReportRuns) -> Section:
    """The paragraph, each task's data, and every version."""
    return Section("methods", "Methods", methods(runs), [_tasks(runs), _versions(runs)])


def _models(runs: ReportRuns) -> str:
    said = []
    for name, files in runs.files.items():
        model = files.medvlm["model"]
        card = model.get("card") if isinstance(model.get("card"), Mapping) else {}
        facts = [str(card.get("family") or "family unknown")]
        if parameters := card.get("parameters"):
            facts.append(f"{parameters / 1e6:.1f} million parameters")
        if model.get("precision"):
            facts.append(str(model["precision"]))
        if quantization := model.get("quantization"):
            facts.append(f"quantised: {option_name(quantization)}")
        if model.get("adapter"):
            facts.append("with an adapter")
        if prompts := model.get("prompts"):
            facts.append(f"prompts: {'the same words for every model' if prompts == 'task' else prompts}")
        if weights := model.get("weights_sha256"):
            facts.append(f"weights SHA-256 {str(weights)[:12]}")
        said.append(f"{name} ({', '.join(facts)})")
    models = len({model_name(files) for files in runs.files.values()})
    return f"We evaluated {_count(len(said), 'run')} of {_count(models, 'model')}: {'; '.join(said)}."


def _data(runs: ReportRuns) -> str:
    sets: dict[str, Mapping[str, Any]] = {}
    for details in _each(runs):
        dataset = details["dataset"]
        sets.setdefault(f"{dataset['name']} {dataset.get('sha256')}", details)
    said = []
    for details in sets.values():
        dataset = details["dataset"]
        scheme = (dataset.get("policies") or {}).get("split_scheme")
        facts = [f"source {dataset.get('source')}", f"licence {dataset.get('licence') or 'not stated'}"]
        facts += [f"revision {dataset['revision']}"] if dataset.get("revision") else []
        facts += [f"records SHA-256 {str(dataset['sha256'])[:12]}"] if dataset.get("sha256") else []
        facts += [f"{scheme} split by patient"] if scheme else []
        said.append(f"{dataset['name']} ({', '.join(facts)})")
    splits = _distinct(str(details["split"]) for details in _each(runs))
    return f"The data were {'; '.join(said)}; scored were the splits {', '.join(splits)}." if said else ""


def _truth(runs: ReportRuns) -> str:
    sources = _distinct(str(one["label_source"]) for one in _each(runs) if one.get("label_source"))
    uncertain = _distinct(str(one["uncertain"]) for one in _each(runs) if one.get("uncertain"))
    if not sources:
        return ""
    policy = f" Uncertain labels: {', '.join(uncertain)}." if uncertain else ""
    return f"Reference labels came from {', '.join(sources)}; they were not read for this evaluation.{policy}"


def _metrics(runs: ReportRuns) -> str:
    primary: dict[str, list[str]] = {}
    for task in runs.tasks():
        details = next(one for run in runs.names if (one := runs.details(run, task)) is not None)
        if not task.endswith(EFFICIENCY) and (metric := primary_metric(details)):
            primary.setdefault(metric_title(metric), []).append(task)
    known = {str(one.get("method")) for details in _each(runs) for one in details["metrics"].values()}
    intervals = [said for start, said in INTERVALS.items() if any(start in method for method in known)]
    by = f" Intervals are 95% intervals from {'; '.join(intervals)}." if intervals else ""
    fits = ""
    if any(details.get("fitted_on") for details in _each(runs)):
        fits = " Thresholds and scalings were fitted on the validation split and held fixed."
    named = "; ".join(f"{metric} of {', '.join(tasks)}" for metric, tasks in primary.items())
    return f"Primary metrics were {named}.{by}{fits}" if primary else ""


def _cost(runs: ReportRuns) -> str:
    machines = []
    for files in runs.files.values():
        if hardware := (files.medvlm.get("efficiency") or {}).get("hardware"):
            gpu = f", {hardware['gpu']}" if hardware.get("gpu") else ""
            machines.append(f"{hardware.get('cpu')} ({hardware.get('cores')} cores){gpu}")
    measured = any(task.endswith(EFFICIENCY) for task in runs.tasks())
    how = (
        "latency at batch size 1 and throughput were measured after warm-up"
        if measured
        else "no cost was measured apart"
    )
    return f"Runs were made on {'; '.join(_distinct(machines))}; {how}." if machines else ""


def _software(runs: ReportRuns) -> str:
    said = []
    for name, title in SOFTWARE.items():
        versions = _distinct(
            str(v) for files in runs.files.values() if (v := (files.medvlm.get("versions") or {}).get(name))
        )
        said += [f"{title} {' and '.join(versions)}"] if versions else []
    return f"Software: {', '.join(said)}." if said else ""


def _tasks(runs: ReportRuns) -> Table:
    rows: list[dict[str, Cell]] = []
    for group in runs.groups(lambda details: True):
        details = runs.files[group.runs[0]].tasks[group.task]
        prompt = details.get("prompt")
        rows.append(
            {
                "task": group.title,
                "version": str(details.get("version")),
                "data": details["dataset"]["name"],
                "split": str(details["split"]),
                "scored": details["scored"],
                "metric": primary_metric(details) or "",
                "labels": str(details.get("label_source") or ""),
                "prompt": prompt if isinstance(prompt, str) else str(details.get("label_set") or ""),
                "runs": len(group.runs),
            }
        )
    titles = {"task": "Task", "version": "Version", "data": "Data", "split": "Split", "scored": "Scored",
              "metric": "Primary metric", "labels": "Truth", "prompt": "Prompt or labels", "runs": "Runs"}  # fmt: skip
    return Table("tasks", "Tasks, data and prompts", [Column(key, title) for key, title in titles.items()], rows)


def _versions(runs: ReportRuns) -> Table:
    rows: list[dict[str, Cell]] = []
    for name, files in runs.files.items():
        model = files.medvlm["model"]
        card = model.get("card") if isinstance(model.get("card"), Mapping) else {}
        versions = files.medvlm.get("versions") or {}
        facts: dict[str, Cell] = {"run": name, "model": model_name(files), "precision": _text(model.get("precision"))}
        facts |= {"quantization": option_name(model.get("quantization")), "adapter": option_name(model.get("adapter"))}
        facts |= {"device": _text(model.get("device")), "parameters": card.get("parameters")}
        facts |= {"weights": str(model.get("weights_sha256") or "unknown")[:12], "licence": _text(card.get("licence"))}
        facts |= {key: _text(versions.get(key)) for key in SOFTWARE}
        rows.append({**facts, "file": files.path.name})
    titles = {"run": "Run", "model": "Model", "precision": "Precision", "quantization": "Quantisation",
              "adapter": "Adapter", "device": "Device", "parameters": "Parameters", "weights": "Weights SHA-256",
              "licence": "Licence", **SOFTWARE, "file": "Results file"}  # fmt: skip
    return Table("runs", "Runs, models and software", [Column(key, title) for key, title in titles.items()], rows)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items() if isinstance(one, str | int | float))
    return "" if value is None else str(value)


def _each(runs: ReportRuns) -> Iterable[Mapping[str, Any]]:
    """What each run says of each task but those of efficiency."""
    for files in runs.files.values():
        for task, details in files.tasks.items():
            if not task.endswith(EFFICIENCY):
                yield details


def _distinct(values: Iterable[str]) -> Sequence[str]:
    return list(dict.fromkeys(values))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
