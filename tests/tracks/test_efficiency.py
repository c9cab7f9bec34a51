from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.model_backends.image_encoder import ImageEncoderBackend
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.text_encoder import TextEncoderBackend
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.model_backends.vlm import VlmBackend
from medvlm_harness.plugin import tasks_folder
from medvlm_harness.requests import ImageRef, Profile, TextRef, TimedBatches, TimingProtocol
from medvlm_harness.results.run import unsupported_reason
from medvlm_harness.tracks.efficiency import Efficiency

NO_GPU = {"vram_allocated_mib": None, "vram_reserved_mib": None, "vram_process_mib": None, "vram_reason": "no GPU"}
READS = TextEncoderBackend.CAPABILITIES
PROMPTS = {"impressions": "Findings: {findings}\nImpression:", "image_reports": "<image>\nFindings:"}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """Ten test studies: the last two lack an image, two say the same."""
    studies = [
        Study(
            f"s{k}",
            f"p{k}",
            () if k > 7 else (fake_image(f"{k}_l.png", "lateral"), fake_image(f"{k}.png")),
            findings=f"finding {k % 9}",
            impression="" if k == 3 else "nothing",
            split="test",
        )
        for k in range(10)
    ]
    return write_set(tmp_path_factory.mktemp("efficiency") / "set", studies)


def task(folder: Path, lm: Any = TinyBackend, **declared: Any) -> Efficiency:
    config = {"task": "cost", "dataset": "synthetic", "labels": ["Edema"], "prompts": PROMPTS, **declared}
    config["metadata"] = {"data_dir": str(folder), **config.get("metadata", {})}
    made = Efficiency(config)
    if lm is not None:
        made.prepare_for(lm)
    return made


def workload(one: Efficiency, **options: Any) -> Any:
    one.build_all_requests(**options)
    (request,) = one.instances
    return request.arguments[1]


def timed(size: int, seconds: Sequence[float], **more: Any) -> TimedBatches:
    memory = {"peak_ram_mib": 100.0 * size, **NO_GPU}
    return TimedBatches(size, tuple(seconds), {"encode_images": tuple(seconds)}, memory, **more)


def profiled(single: TimedBatches, best: TimedBatches, **more: Any) -> Profile:
    values: dict[str, Any] = {
        "searched": ((1, 1.0), (4, 2.0)),
        "search_ended": "a larger batch was no faster",
        "load_seconds": 2.5,
        "parameters": 1000,
        "parameters_active": 700,
        "parameters_trainable": 10,
        "weights_memory_mib": 4.0,
        "weights_disk_mib": None,
        "gflops_per_item": 3.5,
        "hardware": {"cpu": "a CPU"},
        "reasons": {"weights_disk_mib": "the weights lie in no local file"},
    }
    return Profile(single, best, **{**values, **more})


SECONDS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
ENCODER = profiled(timed(1, SECONDS), timed(4, [1.0, 3.0, 1.0, 3.0]))
WRITER = profiled(
    timed(1, [1.0, 2.0, 3.0], first_token_seconds=(0.5, 1.0, 1.5), tokens=(11, 11, 11)),
    timed(4, [2.0, 2.0], tokens=(44, 44)),
)


# --- what is asked


@pytest.mark.parametrize(
    ("lm", "kind", "request_type", "inputs"),
    [
        (TinyBackend, "images", "classify", 8),
        (ImageEncoderBackend, "images", "embed", 8),
        (VlmBackend, "image_reports", "generate_until", 8),
        (LanguageModelBackend, "impressions", "generate_until", 9),
        (SimpleNamespace(CAPABILITIES=READS, lacks={}, floor="copy"), "reports", "embed", 9),
        (SimpleNamespace(CAPABILITIES=READS, lacks={"generate_until": ""}), "reports", "embed", 9),
    ],
)
def test_each_model_is_asked_for_what_it_can_do(
    folder: Path, lm: Any, kind: str, request_type: str, inputs: int
) -> None:
    one = task(folder, lm)
    asked = workload(one)
    assert (one.kind, asked.request, len(asked.inputs)) == (kind, request_type, inputs)
    first = asked.inputs[0]
    if kind == "images":
        assert isinstance(first[0], ImageRef) and first[0].path.name == "0.png"  # the frontal one
        assert (first[1:] == (one.label_set,)) == (request_type == "classify")
    elif kind == "image_reports":
        assert first[0] == PROMPTS["image_reports"] and first[1]["visual"][0].path.name == "0.png"
    elif kind == "impressions":
        assert first == ("Findings: finding 0\nImpression:",)  # and the other study that says so is left out
    else:
        assert first[0] == TextRef("finding 0 nothing")


def test_a_model_of_no_weights_and_a_stock_one_are_refused(folder: Path) -> None:
    assert unsupported_reason(BaselineBackend(), task(folder)) == ("medvlm-baseline cannot answer profile requests")
    assert "cannot answer profile" in str(unsupported_reason(SimpleNamespace(), task(folder)))


def test_a_limit_is_a_number_of_studies(folder: Path) -> None:
    assert len(workload(task(folder), limit=3).inputs) == 3
    with pytest.raises(UserError, match="--limit"):
        task(folder).build_all_requests(limit=0)


def test_of_two_processes_one_measures(folder: Path) -> None:
    asked = [workload(task(folder), rank=rank, world_size=2).inputs for rank in (0, 1)]
    assert [len(inputs) for inputs in asked] == [8, 0]


def test_without_a_model_nothing_is_asked(folder: Path) -> None:
    assert workload(task(folder, None)).inputs == ()


def test_a_set_without_what_is_asked_for_says_what_it_has(
    write_set: Callable[..., Path], tmp_path: Path, fake_image: Callable[..., Image]
) -> None:
    bare = write_set(tmp_path / "bare", [Study("s", "p", (), findings="f", split="test")])
    with pytest.raises(UserError, match="a frontal image in 0, findings in 1 and a report in 1, but images are asked"):
        workload(task(bare))


# --- the protocol


@pytest.mark.parametrize(
    ("declared", "metadata", "iterations", "full"),
    [
        ({}, {}, 10, True),
        ({"profile": "short"}, {}, 3, False),
        ({"profile": "short"}, {"profile": "full"}, 10, True),
        ({"profile": {"iterations": 20}}, {}, 20, True),
        ({}, {"profile": {"seconds": 1.5}}, 10, False),
    ],
)
def test_the_protocol_and_whether_it_is_the_full_one(
    folder: Path, declared: Any, metadata: Any, iterations: int, full: bool
) -> None:
    protocol = task(folder, **declared, metadata=metadata).protocol
    assert (protocol.iterations, protocol.is_full) == (iterations, full)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("shrt", r"'shrt'\. Did you mean short"),
        ({"iteration": 3}, r"unknown key 'iteration' in profile\. Did you mean iterations"),
        ({"iterations": 0}, "expected iterations of profile to be a number from 1, but got 0"),
        ({"seconds": -1}, "expected seconds"),
        ({"warm_up": 1.5}, "expected warm_up"),
        (3, "expected profile to be full, short, or a mapping"),
    ],
)
def test_a_wrong_protocol_is_one_line(folder: Path, profile: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(folder, profile=profile)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "expected prompts to hold the texts impressions and image_reports"),
        ({"impressions": "{findings}"}, "expected prompts"),
        ({**PROMPTS, "more": "x"}, "expected prompts"),
        ({**PROMPTS, "impressions": "no place"}, "to hold {findings}"),
    ],
)
def test_wrong_prompts_are_one_line(folder: Path, prompts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(folder, prompts=prompts)


# --- metrics


def test_metrics_equal_their_definitions(folder: Path, score: Callable[..., Any]) -> None:
    found = score(task(folder), lambda _: [ENCODER])
    for percent in (50, 90, 95, 99):
        assert found.value(f"latency_p{percent}") == pytest.approx(np.percentile(SECONDS, percent) * 1000)
    assert found.value("throughput") == pytest.approx(16 / 8)
    assert found.value("peak_ram_mib") == 400.0
    assert found.estimates["peak_ram_mib"].extra == {"batch_size": 4, "at_batch_size_1": 100.0}
    assert found.value("parameters_active") == 700 and found.value("gflops_per_item") == 3.5
    median = found.estimates["latency_p50"]
    assert median.ci95[0] < median.value < median.ci95[1] and median.method.startswith("bootstrap over iterations")
    assert found.estimates["parameters"].to_dict()["ci95"] is None
    assert not found.records


def test_what_is_undefined_says_why(folder: Path, score: Callable[..., Any]) -> None:
    found = score(task(folder), lambda _: [ENCODER])
    assert np.isnan(found.value("vram_allocated_mib")) and found.estimates["vram_allocated_mib"].reason == "no GPU"
    assert found.estimates["weights_disk_mib"].reason == "the weights lie in no local file"
    assert "time_to_first_token" not in found.estimates


def test_a_generators_tokens(folder: Path, score: Callable[..., Any]) -> None:
    found = score(task(folder, LanguageModelBackend), lambda _: [WRITER])
    assert found.value("time_to_first_token") == 1000.0
    assert found.value("time_per_output_token") == pytest.approx(1000 * (0.5 + 1.0 + 1.5) / 30)
    assert found.value("output_tokens_per_second") == pytest.approx(88 / 4)
    one = profiled(timed(1, [1.0], first_token_seconds=(1.0,), tokens=(1,)), timed(1, [1.0], tokens=(1,)))
    alone = score(task(folder, LanguageModelBackend), lambda _: [one])
    assert alone.estimates["time_per_output_token"].reason == "a text has no second token"


def test_less_is_better_of_all_but_rates(folder: Path) -> None:
    better = task(folder, LanguageModelBackend).higher_is_better()
    assert {name for name, more in better.items() if more} == {"throughput", "output_tokens_per_second"}


def test_protocol_and_hardware_are_part_of_the_result(folder: Path, score: Callable[..., Any]) -> None:
    one = task(folder, profile="short")
    workload(one, limit=5)
    details = score(one, lambda _: [ENCODER]).details
    assert details["hardware"] == {"cpu": "a CPU"} and details["batch_sizes"] == {"1": 1.0, "4": 2.0}
    assert details["protocol"]["iterations"] == 3 and details["protocol"]["full"] is False
    assert details["workload"] == {"kind": "images", "request": "classify", "inputs": 5}
    assert details["counts"] == {"studies_available": 8}
    assert details["best"]["stages_ms_per_item_p50"] == {"encode_images": 500.0}
    assert details["single"]["seconds"] == SECONDS


def test_the_same_in_any_process(folder: Path) -> None:
    one, other = task(folder), task(folder)
    assert str(workload(one)) == str(workload(other)) != str(workload(task(folder), limit=2))


@pytest.mark.parametrize("name", ["iu_cxr", "demo_cxr"])
def test_the_packaged_tasks_say_how_long_they_measure(name: str) -> None:
    text = (tasks_folder() / name / f"{name}_efficiency.yaml").read_text().replace("!function", "")
    declared: Mapping[str, Any] = yaml.safe_load(text)
    assert declared.get("profile", "full") == {"iu_cxr": "full", "demo_cxr": "short"}[name]
    assert TimingProtocol().is_full
