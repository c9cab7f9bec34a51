"""Fill docs/baselines.md: run every model of baselines.yaml whose weights are here, and say of the others "not run".

    python benchmarks/baselines.py --weights weights --output out/baselines

Goes on where it was stopped (it is a sweep). Needs the prepared IU-CXR; what lies where is said in baselines.yaml.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError
from medvlm_harness.files import write_whole
from medvlm_harness.model_backends.catalogue import catalogue
from medvlm_harness.results.markdown import markdown_table
from medvlm_harness.results.run_cost import cost_of
from medvlm_harness.results.run_files import RunFiles, read_run
from medvlm_harness.sweeps.declaration import Model, Sweep, read_sweep
from medvlm_harness.sweeps.state import read_record

SWEEP = Path(__file__).with_name("baselines.yaml")
PAGE = Path(__file__).parents[1] / "docs" / "baselines.md"
# task:metric -> what its column is called.
COLUMNS = {
    "iu_cxr_zeroshot:auroc": "Labels, AUROC",
    "iu_cxr_rare:auroc": "Rare findings, AUROC",
    "iu_cxr_retrieval:i2t_recall@10": "Image to report, R@10",
    "iu_cxr_report_generation:entity_f1_simple": "Reports, entity F1",
    "iu_cxr_summarization:rougeL": "Summaries, ROUGE-L",
    "iu_cxr_entities:mesh_f1": "Entities, F1",
    "iu_cxr_impression_choice:acc": "Choice, accuracy",
    "iu_cxr_text_probe:auroc": "Text probe, AUROC",
    "iu_cxr_robustness_zeroshot:auroc_retention": "Kept under corruptions",
}
COSTS = {"latency_p50": "Latency ms", "weights_memory_mib": "Weights MiB"}

HEAD = """# Baselines

Every named model on R2Gen's test split of IU-CXR, written by

    {command}

A model whose weights were not on the machine was not run, and no number of anybody else's stands in for it. Brackets
hold 95% intervals over studies; n/a: the model cannot do the track. The last rows are floors, which look at no image or
copy what they are given: read every number beside them.

{table}

Where each file goes is said in [baselines.yaml](../benchmarks/baselines.yaml); what each model was trained on, its
licence and its traps, by `medvlm models NAME` ([models.md](models.md)). Differences between two runs with their own
intervals: `medvlm compare` ([comparison.md](comparison.md)).
"""


def main() -> None:
    """Run what can be run, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder with one folder for each model")
    parser.add_argument("--output", type=Path, default=Path("out/baselines"), help="of the sweep")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="further placeholders")
    parser.add_argument("--page", type=Path, default=PAGE, help="file that the table is written to")
    arguments = parser.parse_args()
    given = [f"WEIGHTS={arguments.weights}", *arguments.set]
    sweep = read_sweep(SWEEP, dict(one.split("=", 1) for one in given))
    absent = {model.name: path for model in sweep.models if (path := absent_weights(model, arguments.weights))}
    chosen = [f"--only={model.name}" for model in sweep.models if model.name not in absent]
    command = [sys.executable, "-m", "medvlm_harness", "sweep", "run", str(SWEEP), f"--output={arguments.output}"]
    ended = subprocess.run([*command, *(f"--set={one}" for one in given), *chosen], check=False)
    if ended.returncode not in (0, 1):  # 1: some cells failed, and their rows say why
        sys.exit(ended.returncode)
    write_whole(arguments.page, page(sweep, absent, *outcomes(arguments.output)))
    print(f"wrote {arguments.page}")


def absent_weights(model: Model, weights: Path) -> Path | None:
    """The first path below `weights` that a model is given and that is not there."""
    paths = (Path(str(value)) for value in model.args.values())
    return next((path for path in paths if path.is_relative_to(weights) and not path.exists()), None)


def outcomes(folder: Path) -> tuple[dict[str, RunFiles], dict[str, str]]:
    """The runs of the models that are done, and why others failed, both by the model's name."""
    runs, failed = {}, {}
    recorded = read_record(folder)
    for cell, (_, files) in zip(recorded.cells, recorded.folders(folder), strict=True):
        state, results = files.state(), files.results()
        if state.status == "done" and results is not None:
            runs[cell["place"]["model"]] = read_run(results)
        else:
            failed[cell["place"]["model"]] = state.reason or state.status
    return runs, failed


def page(sweep: Sweep, absent: Mapping[str, Path], runs: Mapping[str, RunFiles], failed: Mapping[str, str]) -> str:
    """The page's Markdown."""
    rows: list[tuple[str, ...]] = [("Model", "Parameters", "Checkpoint", *COLUMNS.values(), *COSTS.values(), "State")]
    for model in sweep.models:
        if model.name in runs:
            run = runs[model.name]
            cells, state = [*(_cell(run, column) for column in COLUMNS), *_costs(run)], _ran(run)
        else:
            why = f"no weights at {absent[model.name].name}" if model.name in absent else failed.get(model.name, "")
            cells, state = [""] * (len(COLUMNS) + len(COSTS)), f"not run: {why}"
        rows.append((model.name, *_published(model), *cells, state))
    command = shlex.join(["python", "benchmarks/baselines.py", "--weights", "DIR"])
    return HEAD.format(command=command, table="\n".join(markdown_table(rows)))


def _published(model: Model) -> tuple[str, str]:
    """Parameters and checkpoint, as the model's card says."""
    entry = catalogue().get(str(model.args.get("card", model.name)))
    if entry is None or entry.card.source is None:
        return "", ""
    source, parameters = entry.card.source, entry.card.parameters
    size = "" if parameters is None else f"{parameters / 1e6:.1f}M"
    return size, f"{source.location} ({source.revision or 'unpinned'})"


def _cell(run: RunFiles, column: str) -> str:
    task, _, metric = column.partition(":")
    found: Mapping[str, Any] | None = run.tasks.get(task, {}).get("metrics", {}).get(metric)
    if found is None:
        return "n/a"
    if found["value"] is None:
        return "undefined"
    interval = "" if found["ci95"] is None else " [{:.3f}, {:.3f}]".format(*found["ci95"])
    return f"{found['value']:.3f}{interval}"


def _costs(run: RunFiles) -> list[str]:
    costs = cost_of(run)
    return ["n/a" if costs[one]["value"] is None else f"{costs[one]['value']:.4g}" for one in COSTS]


def _ran(run: RunFiles) -> str:
    notes = {str(task["contamination"]["note"]) for task in run.tasks.values() if task["contamination"]["note"]}
    return "; ".join(["run", *sorted(notes)])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
