"""Fixtures that every test folder shares: where the real data lies, and how a tiny synthetic copy is made."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.locate import find_dataset
from medvlm_harness.data.prepare import PrepareReport, prepare_iu_cxr
from medvlm_harness.data.records import Dataset, Manifest, Study, read_dataset, write_dataset
from medvlm_harness.data.records import Image as RecordImage
from medvlm_harness.demo.generate import prepare_demo
from medvlm_harness.results.run_files import RunFiles, read_run
from medvlm_harness.results.scores import write_scores

ROOT = Path(__file__).resolve().parents[1]
RUN_DATE = "2026-01-02T03-04-05.000006"
REPORT_HEADER = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")


@pytest.fixture(scope="session", autouse=True)
def sessions_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the fixtures of a module or a session compute stays out of the user's store as well."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MEDVLM_STORE", str(tmp_path_factory.mktemp("store") / "store.sqlite"))
        yield


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a store of its own, and the user's is never touched."""
    monkeypatch.setenv("MEDVLM_STORE", str(tmp_path / "store.sqlite"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data for development; tests on it are skipped elsewhere."""
    folder = Path(os.environ.get("MEDVLM_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the real data, in {folder} or $MEDVLM_SHARED")
    return folder


@pytest.fixture(scope="session")
def iu_cxr_report(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareReport:
    """The real IU-CXR, prepared once for the whole run, with the labeler's table."""
    source = shared / "data" / "iu_cxr"
    out = tmp_path_factory.mktemp("prepared") / "iu_cxr"
    return prepare_iu_cxr(source, labels=source / "labels_and_splits.csv", out=out)


@pytest.fixture(scope="session")
def iu_cxr(iu_cxr_report: PrepareReport) -> Dataset:
    """The same, read back."""
    return find_dataset("iu_cxr", data_dir=iu_cxr_report.folder)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The demo set as users get it."""
    return read_dataset(prepare_demo(tmp_path_factory.mktemp("demo") / "demo_cxr"))


@pytest.fixture(scope="session")
def demo_runs(demo: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results files of two limited runs on the demo, samples beside them: a small dual encoder's, a constant text's.

    Together they hold what most kinds of track say; probes and costs take too long.
    """
    from medvlm_harness import plugin

    plugin.install()
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    runs = {}
    kinds = {
        "tiny": ("medvlm-tiny", {}, "zeroshot view retrieval robustness_zeroshot text_zeroshot"),
        "constant": ("medvlm-baseline", {"kind": "constant"}, "summarization entities image_use_reports"),
    }
    for name, (model, model_args, tasks) in kinds.items():
        output = tmp_path_factory.mktemp("demo_runs")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
            manager = TaskManager(metadata={"data_dir": str(demo.folder)})
            tracker = EvaluationTracker(output_path=str(output))
            names = [f"demo_cxr_{task}" for task in tasks.split()]
            results = lm_eval.simple_evaluate(
                model, model_args, names, limit=4, task_manager=manager, evaluation_tracker=tracker
            )
            samples = results.pop("samples")
            tracker.save_results_aggregated(results=results, samples=samples)
            for task in results["configs"]:
                tracker.save_results_samples(task_name=task, samples=samples[task])
        (runs[name],) = output.glob("*/results_*.json")
    return runs


@pytest.fixture(scope="session")
def write_image() -> Callable[..., Path]:
    """Write a small random image; the suffix picks the format."""

    def write(path: Path, *, size: tuple[int, int] = (12, 10), seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def write_csv() -> Callable[..., Path]:
    """Write a table as given, rows of a wrong length included."""

    def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write


@pytest.fixture
def kaggle_folder(tmp_path: Path, write_image: Callable[..., Path], write_csv: Callable[..., Path]) -> Path:
    """A faultless copy in Kaggle's layout: uid 1 and 4 in the published train split, 2 outside it, JPEG and PNG."""
    folder = tmp_path / "kaggle"
    reports = [
        (1, "normal", "normal", "", "cough", "None.", "the lungs are clear", "no acute disease"),
        (2, "No Indexing", "No Indexing", "", "pain", "", "", "stable"),
        (4, "Cardiomegaly/borderline;Opacity/lung", "x", "", "", "", "large heart", ""),
    ]
    projections = [
        (1, "1_IM-0001-4001.dcm.png", "Frontal"),
        (1, "1_IM-0001-3001.dcm.png", "Lateral"),
        (4, "4_IM-2050-1001.dcm.png", "Frontal"),
    ]
    write_csv(folder / "indiana_reports.csv", REPORT_HEADER, reports)
    write_csv(folder / "indiana_projections.csv", ("uid", "filename", "projection"), projections)
    for seed, name in enumerate(("1_IM-0001-4001.dcm.jpg", "1_IM-0001-3001.dcm.png", "4_IM-2050-1001.png")):
        write_image(folder / "images" / "deep" / name, seed=seed)
    return folder


@pytest.fixture(scope="session")
def forbid_sockets() -> Callable[[pytest.MonkeyPatch], None]:
    """From here on whatever connects or looks up a host fails, with an error that no library takes for "offline"."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a socket was asked for: {args[-2:]} {kwargs}")

    def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket.socket, "connect_ex", refuse)
        monkeypatch.setattr(socket, "create_connection", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    return forbid


@pytest.fixture
def no_network(forbid_sockets: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One test without a network."""
    forbid_sockets(monkeypatch)


@pytest.fixture(scope="session")
def write_set() -> Callable[..., Path]:
    """Write a synthetic prepared set and give back its folder; label sources are those of the studies, in order."""

    def write(folder: Path, studies: Sequence[Study], *, name: str = "synthetic", **manifest: Any) -> Path:
        sources = tuple(dict.fromkeys(source for study in studies for source in study.labels))
        values = {
            "source": "demo",
            "image_root": str(folder),
            "licence": "none",
            "counts": {"studies": len(studies)},
            "dropped": {},
            "label_sources": sources,
            "label_names": CHEXPERT_14,
            "policies": {"split_scheme": "hash"},
        }
        return write_dataset(folder, studies, Manifest(name=name, **{**values, **manifest}))

    return write


@pytest.fixture(scope="session")
def fake_image() -> Callable[..., RecordImage]:
    """An image record of a file that nobody opens."""

    def make(file: str, view: str | None = "frontal") -> RecordImage:
        return RecordImage(file, hashlib.sha256(file.encode()).hexdigest(), view, 8, 8)

    return make


STOCK_TASK = """
task: stock_task
output_type: multiple_choice
custom_dataset: !function data.documents
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""
STOCK_DATA = """
from datasets import Dataset

def documents(**options):
    return {"test": Dataset.from_list([{"question": f"Is it {i}?", "answer": i % 2} for i in range(12)])}
"""


@pytest.fixture
def stock_folder(tmp_path: Path) -> Path:
    """A task folder that is lm-eval's own kind throughout."""
    folder = tmp_path / "stock"
    folder.mkdir()
    (folder / "stock.yaml").write_text(STOCK_TASK, encoding="utf-8")
    (folder / "data.py").write_text(STOCK_DATA, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal language model of two layers in transformers' layout; its tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("small_language_model")
    special = ["<pad>", "</s>", "<s>"]
    vocabulary = {token: k for k, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=len(vocabulary), max_position_embeddings=1024, initializer_range=0.3, **sizes, **tokens
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def light_and_dark(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Dataset:
    """Studies whose one image is light or dark, and whose findings say which, in one word."""
    folder = tmp_path_factory.mktemp("light_and_dark")
    studies = []
    for number, split in enumerate(["train"] * 16 + ["validation"] * 4 + ["test"] * 4):
        findings = ("light", "dark")[number % 2]
        low = {"light": 170, "dark": 10}[findings]
        pixels = np.random.default_rng(number).integers(low, low + 60, (24, 24), dtype=np.uint8)
        file = folder / f"{number}.png"
        Image.fromarray(pixels).save(file)
        image = RecordImage(file.name, hashlib.sha256(file.read_bytes()).hexdigest(), "frontal", 24, 24)
        studies.append(
            Study(f"s{number:02}", f"p{number:02}", (image,), indication="cough", findings=findings, split=split)
        )
    return read_dataset(write_set(folder, studies, name="light_and_dark"))


@pytest.fixture(scope="session")
def projector_of(small_language_model: Path, light_and_dark: Dataset) -> Callable[..., Any]:
    """Train a projector on the above into a folder; gives back what the method says of it."""
    from medvlm_harness.training.data import TrainingData
    from medvlm_harness.training.finetune import finetune
    from medvlm_harness.training.methods import Schedule
    from medvlm_harness.training.projector import ProjectorMethod

    def train(output: Path, *, steps: int = 60, eval_steps: int = 20, seed: int = 0, **options: Any) -> Any:
        values = {"grid": 2, "hidden": 32, "instruction": "Findings:", "learning_rate": 0.01, **options}
        method = ProjectorMethod(
            model="medvlm-tiny",
            device="cpu",
            language_model=str(small_language_model),
            schedule=Schedule(steps=steps, batch_size=4, eval_steps=eval_steps, seed=seed),
            **values,
        )
        return finetune(method, TrainingData.of(light_and_dark), output)

    return train


@pytest.fixture(scope="session")
def trained_projector(tmp_path_factory: pytest.TempPathFactory, projector_of: Callable[..., Any]) -> Path:
    """One that learnt to tell light from dark."""
    output = tmp_path_factory.mktemp("trained") / "light-or-dark"
    projector_of(output)
    return output


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., RunFiles]:
    """Write the files of a run of one task `t` and read it back."""

    def run(
        name: str, rows: list[dict[str, Any]] | None, *, metrics: Mapping[str, Any] | None = None, task: str = "t",
        model: Mapping[str, Any] | None = None, **details: Any,
    ) -> RunFiles:  # fmt: skip
        estimates = {k: {"value": v, "ci95": None, "reason": None} for k, v in (metrics or {}).items()}
        dataset = {"name": "d", "sha256": "1"}
        block = {
            "schema_version": 1,
            "model": {"card": {"name": "m"}, "precision": name, **(model or {})},
            "tasks": {task: {"dataset": dataset, "split": "test", "version": 1, "metrics": estimates, **details}},
            "unsupported": {"v": "m cannot write"},
        }
        folder = tmp_path / name
        folder.mkdir()
        path = folder / f"results_{RUN_DATE}.json"
        higher = {task: {"median": False}}
        path.write_text(json.dumps({"results": {}, "medvlm": block, "higher_is_better": higher}), encoding="utf-8")
        if rows is not None:
            write_scores(folder / f"run_{RUN_DATE}" / "scores.parquet", [{"task": task, **row} for row in rows])
        return read_run(path)

    return run
