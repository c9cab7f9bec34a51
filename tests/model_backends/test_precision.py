from __future__ import annotations

import numpy as np
import pytest
import torch

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.precision import PRECISIONS, choose_precision, dtype_of
from medvlm_harness.model_backends.tiny import TinyBackend

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PRECISIONS)
def test_what_is_asked_for_is_taken(name: str) -> None:
    assert choose_precision(name, CPU) == name
    assert str(dtype_of(name)) == {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[name]


@pytest.mark.parametrize(("amx", "expected"), [(True, "bf16"), (False, "fp32")])
def test_automatic_is_bf16_on_a_cpu_with_matrix_units_for_it(
    amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx, "avx512_bf16": True})
    assert choose_precision("auto", CPU) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_automatic_on_cuda_goes_by_the_generation(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda:0")) == expected


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"fp32, bf16, fp16, auto, but got 'fp23'\. Did you mean fp32\?"):
        choose_precision("fp23", CPU)


def test_a_model_computes_in_its_precision_and_says_so(embed_requests: object) -> None:
    vectors = {}
    for name in ("fp32", "bf16"):
        backend = TinyBackend(precision=name, device="cpu")
        (vectors[name],) = backend.embed(embed_requests(["a report"]))  # type: ignore[operator]
        assert {p.dtype for p in backend.tiny.parameters()} == {dtype_of(name)}
        assert backend.describe()["precision"] == backend.describe()["precision_asked"] == name
    difference = np.abs(vectors["fp32"].vector - vectors["bf16"].vector).max()
    assert 1e-7 < difference < 0.05


def test_automatic_is_recorded_beside_what_it_chose() -> None:
    described = TinyBackend(precision="auto", device="cpu").describe()
    assert described["precision_asked"] == "auto"
    assert described["precision"] in PRECISIONS
