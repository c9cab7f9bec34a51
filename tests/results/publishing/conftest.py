"""A Hub on this machine that fails when told to, and a real small run to push to it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import numpy as np
import pytest

from medvlm_harness import plugin
from medvlm_harness.data.records import Image, Study
from medvlm_harness.demo.local_hub import Answer, LocalHub, Repo, serving
from medvlm_harness.results.publishing.hub import Hub

TOKEN = "hf_" + "thisIsATestToken0"
REPO = "acme/results"
SENTENCE = "There is a small calcified granuloma in the left upper lobe unchanged from before."
YAML = """
class: !function medvlm_harness.ZeroShot
task: syn_zeroshot
dataset: synthetic
sharing: hashed
labels: [Edema, Fracture, Pneumonia]
views: [frontal]
metadata: {version: 2}
"""


@dataclass
class Failure:
    """What a request gets instead of its answer, the first `times` times that its path holds `part`."""

    part: str
    status: int
    times: int
    headers: dict[str, str]
    body: bytes
    delay: float


class FakeHub(LocalHub):
    """The local Hub, which fails when told to and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(TOKEN)
        self.log: list[tuple[str, str]] = []  # path, Authorization
        self.created: list[dict[str, Any]] = []
        self.failures: list[Failure] = []
        self.before_commit: list[Callable[[], None]] = []
        self.counting = threading.Lock()

    def fail(
        self,
        part: str,
        status: int = 0,
        *,
        times: int = 10**6,
        headers: dict[str, str] | None = None,
        body: bytes = b'{"error": "as told"}',
        delay: float = 0,
    ) -> None:
        """Answer so, instead, or (status 0) as ever after a delay."""
        self.failures.append(Failure(part, status, times, headers or {}, body, delay))

    def answer(self, path: str, query: Mapping[str, list[str]], authorization: str, body: bytes) -> Answer:
        self.log.append((path, authorization))
        failure = self.next_failure(path)
        if failure is not None:
            time.sleep(failure.delay)
            if failure.status:
                return Answer(failure.status, failure.body, failure.headers)
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
        if "/commit/" in path and self.before_commit:
            self.before_commit.pop()()
        return super().answer(path, query, authorization, body)

    def next_failure(self, path: str) -> Failure | None:
        with self.counting:
            for failure in self.failures:
                if failure.part in path and failure.times > 0:
                    failure.times -= 1
                    return failure
        return None

    @property
    def results(self) -> Repo:
        """The repo that tests push to."""
        return self.repos[f"datasets/{REPO}"]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The server, running; the client may go on-line, has a token, and waits for nothing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", quick)
    hub = FakeHub()
    with serving(hub):
        yield hub


@pytest.fixture
def model_repo(fake_hub: FakeHub) -> Repo:
    """A model on it."""
    fake_hub.repos["models/acme/model"] = repo = Repo(private=False, files={})
    return repo


@dataclass
class Told:
    """What a client said and how long it wanted to wait."""

    lines: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def hub(fake_hub: FakeHub, told: Told) -> Hub:
    """A client of it with three attempts."""
    return Hub(fake_hub.url, TOKEN, timeout=5, waits=(1.0, 2.0), sleep=told.waits.append, tell=told.lines.append)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """A folder with `data` (a prepared set of 120 studies that is shared hashed) and `out`, a run with its samples.

    Of the labels Edema is frequent, Fracture has 12 positives and Pneumonia three; a subgroup has four members.
    """
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    root: Path = tmp_path_factory.mktemp("publishing")
    rng = np.random.default_rng(3)
    studies = [
        Study(
            f"study{k:03}",
            f"patient{k:03}",
            (fake_image(f"{k}_f.png"),),
            findings=f"{SENTENCE} Seen in study number {k}.",
            impression="Heart size is normal today.",
            labels={
                "rules": {"Edema": int(rng.random() < 0.4), "Fracture": int(k % 10 == 0), "Pneumonia": int(k % 40 == 1)}
            },
            subgroups={"sex": "male" if k < 4 else "female"} if k < 100 else {},
            split="test" if k < 120 else "validation",
        )
        for k in range(180)
    ]
    write_set(root / "data" / "synthetic", studies, label_names=("Edema", "Fracture", "Pneumonia"))
    (root / "tasks").mkdir()
    (root / "tasks" / "syn_zeroshot.yaml").write_text(YAML, encoding="utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MEDVLM_DATA", str(root / "data"))
        monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
        plugin.install()
        tracker = EvaluationTracker(output_path=str(root / "out"))
        done = lm_eval.simple_evaluate(
            model="medvlm-baseline",
            model_args="kind=random",
            tasks=["syn_zeroshot"],
            task_manager=TaskManager(include_path=str(root / "tasks")),
            evaluation_tracker=tracker,
            log_samples=True,
        )
        samples = done.pop("samples")
        tracker.save_results_aggregated(results=done, samples=samples)
        tracker.save_results_samples(task_name="syn_zeroshot", samples=samples["syn_zeroshot"])
    return root


@pytest.fixture
def run_file(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results file of a copy of the run that a test may spoil; its data is found."""
    monkeypatch.setenv("MEDVLM_DATA", str(finished / "data"))
    shutil.copytree(finished / "out", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("results_*.json")
    return path


@pytest.fixture
def change(run_file: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Change the results of the copy, as if the evaluation had written them so: without the manifest."""

    def changed(edit: Callable[[dict[str, Any]], None]) -> Path:
        results = json.loads(run_file.read_text(encoding="utf-8"))
        edit(results)
        run_file.write_text(json.dumps(results), encoding="utf-8")
        for manifest in run_file.parent.rglob("manifest*"):
            manifest.unlink()
        return run_file

    return changed
