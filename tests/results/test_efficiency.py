from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from medvlm_harness.data.records import Dataset
from medvlm_harness.model_backends.meter import Batch
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.results.efficiency import NOTHING_COMPUTED, efficiency_block

NO_GPU = {"vram_allocated_mib": None, "vram_reserved_mib": None, "vram_process_mib": None, "vram_reason": "no GPU"}


def process(seconds: float, stages: Any, ram: float, **gpu: Any) -> dict[str, Any]:
    memory = {"peak_ram_mib": ram, "ram_mib": ram / 2, **NO_GPU, **gpu}
    return {"seconds": seconds, "stages": stages, "memory": memory, "hardware": {"cpu": "one"}}


def test_of_processes_items_add_up_and_time_and_memory_are_of_the_largest() -> None:
    found = efficiency_block(
        [process(5.0, {"score": [Batch(2, 8, 1.0)]}, 300.0), process(7.0, {"score": [Batch(3, 9, 2.0)]}, 200.0)]
    )
    assert (found["seconds"], found["processes"], found["peak_ram_mib"], found["ram_mib"]) == (7.0, 2, 300.0, 150.0)
    assert found["stages"]["score"]["items"] == 5 and found["stages"]["score"]["seconds"] == 2.0
    assert found["vram_allocated_mib"] is None and found["vram_reason"] == "no GPU"
    assert found["reason"] is None and found["hardware"] == {"cpu": "one"}


def test_a_gpus_memory_is_that_of_the_process_with_most() -> None:
    score = {"score": [Batch(1, 1, 1.0)]}
    gpu = [{"vram_allocated_mib": value, "vram_reason": None} for value in (10.0, 30.0)]
    found = efficiency_block([process(1.0, score, 1.0, **one) for one in gpu])
    assert found["vram_allocated_mib"] == 30.0 and found["vram_reason"] is None
    assert found["vram_process_mib"] is None


def test_what_came_from_the_store_alone_is_no_measurement() -> None:
    found = efficiency_block([process(1.0, {"store": [Batch(9, None, 0.1)], "load": [Batch(1, None, 3.0)]}, 500.0)])
    assert found["stages"] is None and found["reason"] == NOTHING_COMPUTED and found["peak_ram_mib"] is None
    assert found["seconds"] == 1.0


def test_a_run_says_what_it_computed_and_the_next_one_that_it_computed_nothing(
    run: Callable[..., Any], demo: Dataset
) -> None:
    options = {"metadata": {"data_dir": str(demo.folder)}, "limit": 6}
    first = run(["demo_cxr_retrieval"], TinyBackend(device="cpu"), **options)["medvlm"]["efficiency"]
    stages = first["stages"]
    assert stages["encode_images"]["items"] == stages["decode"]["items"] == 6
    assert stages["load"]["items"] == 1 and stages["encode_images"]["items_per_second"] > 0
    assert 0 < sum(stage["seconds"] for stage in stages.values()) <= first["seconds"]
    assert first["peak_ram_mib"] >= first["ram_mib"] > 0 and first["reason"] is None
    second = run(["demo_cxr_retrieval"], TinyBackend(device="cpu"), **options)["medvlm"]["efficiency"]
    assert second["stages"] is None and second["reason"] == NOTHING_COMPUTED
    json.dumps([first, second], allow_nan=False)


def test_a_task_of_efficiency_counts_for_no_stage_and_bypasses_the_store(
    run: Callable[..., Any], demo: Dataset
) -> None:
    from medvlm_harness.tracks.efficiency import PROTOCOLS

    options = {"metadata": {"data_dir": str(demo.folder)}, "limit": 6}
    model = TinyBackend(device="cpu")
    results = run(["demo_cxr_efficiency"], model, **options)
    block = results["medvlm"]
    assert block["efficiency"]["reason"] == NOTHING_COMPUTED
    assert block["model"]["images_encoded"] == block["model"]["images_recalled"] == 0
    details = block["tasks"]["demo_cxr_efficiency"]
    assert len(details["single"]["seconds"]) == PROTOCOLS["short"].iterations
    assert results["results"]["demo_cxr_efficiency"]["latency_p50,none"] > 0
    assert details["metrics"]["vram_allocated_mib"]["value"] is None
    assert not model._image_vectors and not model._text_vectors


@pytest.mark.parametrize("model", ["medvlm-baseline"])
def test_a_model_that_does_not_tell_is_named(run: Callable[..., Any], model: str) -> None:
    found = run(["syn_view"], model)["medvlm"]["efficiency"]
    assert found["stages"] is None and found["reason"].startswith("BaselineBackend does not tell")
    assert found["seconds"] > 0
