"""Finished runs on the demo set, and the same with other names: what reports are made of."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medvlm_harness import plugin
from medvlm_harness.cli import main
from medvlm_harness.data.records import Dataset
from medvlm_harness.results.report.build import build_report
from medvlm_harness.results.report.parts import Report
from medvlm_harness.results.report.runs import name_runs
from medvlm_harness.results.run_files import RunFiles, find_runs, read_run

DATE = "2026-01-02T03-04-05.000006"
# Each would do something where it is not escaped: in HTML, in Markdown, in LaTeX, in a plot, in a spreadsheet.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a|b `c` **d** $x^2$ \\input{/etc/passwd}",
    "](javascript:alert(1)) [x](http://evil.example/)",
    "=1+1",
)

Edit = Callable[[dict[str, Any]], None]


def _medvlm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    import lm_eval.utils

    monkeypatch.setattr(lm_eval.utils, "setup_logging", lambda *_: None)
    monkeypatch.setattr(plugin.scope, "builtin_tasks", True)
    monkeypatch.setattr(sys, "argv", ["medvlm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, demo: Dataset) -> Path:
    """A run that guesses labels, and one of 30 studies that always writes the same summary, with its samples."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MEDVLM_DATA", str(demo.folder.parent))
        tasks = "demo_cxr_zeroshot,demo_cxr_view,demo_cxr_retrieval,demo_cxr_robustness_zeroshot,demo_cxr_efficiency"
        common = ("run", "--model", "medvlm-baseline", "--model_args")
        _medvlm(monkeypatch, *common, "kind=random", "--tasks", tasks, "--output_path", str(out / "labels"))
        texts = (
            "--tasks",
            "demo_cxr_summarization",
            "--limit",
            "30",
            "--log_samples",
            "--output_path",
            str(out / "texts"),
        )
        _medvlm(monkeypatch, *common, "kind=constant", *texts)
    return out


@pytest.fixture(scope="session")
def guessing(finished: Path) -> RunFiles:
    """The run that guesses labels."""
    (run,) = find_runs(finished / "labels")
    return run


@pytest.fixture(scope="session")
def writing(finished: Path) -> RunFiles:
    """The run that writes summaries."""
    (run,) = find_runs(finished / "texts")
    return run


@pytest.fixture(scope="session")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFiles]:
    """A copy of a run, with something else in its block `medvlm`, and other scores where they are asked for."""

    def make(run: RunFiles, edit: Edit, *, better: float = 0.0) -> RunFiles:
        folder = tmp_path_factory.mktemp("edited")
        results = json.loads(run.path.read_text(encoding="utf-8"))
        edit(results["medvlm"])
        path = folder / f"results_{DATE}.json"
        path.write_text(json.dumps(results), encoding="utf-8")
        if run.scores is not None:
            scores = pq.read_table(run.scores)
            if better:
                shifted = np.array(scores["margin"].cast(pa.float64())) + better * np.nan_to_num(scores["target"])
                place = scores.schema.get_field_index("margin")
                kept = scores.schema.field("margin")
                scores = scores.set_column(place, kept, pa.array(shifted, from_pandas=True).cast(kept.type))
            (folder / f"run_{DATE}").mkdir()
            pq.write_table(scores, folder / f"run_{DATE}" / "scores.parquet")
        for samples in run.path.parent.glob("samples_*.jsonl"):
            task = samples.name.removeprefix("samples_").rpartition("_")[0]
            shutil.copy(samples, folder / f"samples_{task}_{DATE}.jsonl")
        return read_run(path)

    return make


def as_model(name: str, **options: Any) -> Edit:
    """What makes a baseline's run that of a model: its name, its family, its weights."""

    def edit(block: dict[str, Any]) -> None:
        block["model"] |= {"weights_sha256": "0" * 64, "precision": "fp32", "kind": None, **options}
        block["model"]["card"] |= {"name": name, "family": "dual encoder", "parameters": 1_000_000}

    return edit


@pytest.fixture(scope="session")
def several(guessing: RunFiles, writing: RunFiles, edited: Callable[..., RunFiles]) -> dict[str, RunFiles]:
    """Four runs: a model at two precisions, a baseline, and a writer."""
    whole = edited(guessing, as_model("reader"), better=0.3)
    small = edited(guessing, as_model("reader", quantization={"method": "int8"}), better=0.2)
    return name_runs([whole, small, guessing, writing])


@pytest.fixture(scope="session")
def report(several: dict[str, RunFiles]) -> Report:
    """The report of those."""
    return build_report(several, title="Four runs", show_text=True)


@pytest.fixture(scope="session")
def hostile(guessing: RunFiles, writing: RunFiles, edited: Callable[..., RunFiles]) -> Report:
    """A report of runs whose every free text is an attack, and whose texts are too."""

    def attack(k: int) -> Edit:
        text = HOSTILE[k % len(HOSTILE)]

        def edit(block: dict[str, Any]) -> None:
            as_model(text)(block)
            block["model"]["card"] |= {"licence": text, "summary": text}
            block["versions"] = dict.fromkeys(block["versions"], text)
            block["unsupported"] = {text: text}
            for details in block["tasks"].values():
                details["contamination"]["note"] = text
                details["dataset"] |= {"licence": text, "source": text}
                details["prompt"] = text
                for estimate in details["metrics"].values():
                    estimate["reason"] = text
                for attribute in list(details.get("subgroups", {})):
                    for label in details["subgroups"][attribute].values():
                        label["groups"] = {f"{text} {name}": one for name, one in label["groups"].items()}

        return edit

    writer = edited(writing, attack(0))
    (samples,) = writer.path.parent.glob("samples_demo_cxr_summarization_*.jsonl")
    lines = []
    for k, line in enumerate(samples.read_text(encoding="utf-8").splitlines()):
        sample = json.loads(line)
        sample["filtered_resps"] = sample["target"] = HOSTILE[k % len(HOSTILE)]
        sample["filtered_resps"] = [sample["filtered_resps"]]
        lines.append(json.dumps(sample))
    samples.write_text("\n".join(lines), encoding="utf-8")
    runs = [edited(guessing, attack(k)) for k in range(len(HOSTILE))]
    return build_report(name_runs([*runs, writer]), title=HOSTILE[1], show_text=True)
