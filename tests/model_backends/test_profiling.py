from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from medvlm_harness.model_backends import profiling
from medvlm_harness.model_backends.batching import BatchSize
from medvlm_harness.model_backends.footprint import footprint
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.meter import Meter
from medvlm_harness.model_backends.profiling import active_parameters, count_flops, profile
from medvlm_harness.model_backends.text_encoder import TextEncoderBackend
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.model_backends.vlm import VlmBackend
from medvlm_harness.requests import LabelSet, Profile, TextRef, TimingProtocol, Workload

QUICK = TimingProtocol(warm_up=1, iterations=3, seconds=0.0, new_tokens=6, max_batch_size=2)
LABELS = LabelSet.from_config("two", ["Edema", "Fracture"])


def measured(
    backend: Any, request: Any, inputs: Sequence[tuple[Any, ...]], protocol: TimingProtocol = QUICK
) -> Profile:
    found = profile(backend, Workload(request, tuple(inputs), protocol))
    assert found is not None
    return found


# --- the protocol, on a backend whose time is written down


class Timed:
    """Answers so fast as a table says: batch size -> seconds on the clock that the profile reads."""

    device = torch.device("cpu")
    model = None
    max_batch_size = None

    def __init__(self, seconds: dict[int, float], *, asked: int | None = None, ram: dict[int, float] | None = None):
        self.now, self.table, self.batch_size = 0.0, seconds, asked
        self.meter, self.calls = Meter(self.device, lambda: self.now), []
        self.batching = BatchSize(1)
        self.ram = ram or {}
        self.memory = SimpleNamespace(reset=lambda: None, peak=lambda anew: {"peak_ram_mib": self._peak()})
        self.splits_at = 10**9

    def _peak(self) -> float:
        return self.ram.get(self.batching.asked or 0, 100.0)

    def parts(self) -> list[Any]:
        return [self]

    def forget(self) -> None:
        self.calls.append("forget")

    def use_batch_size(self, size: int) -> None:
        self.batching = BatchSize(size)

    def embed(self, requests: Sequence[Any]) -> None:
        self.calls.append(tuple(str(one.arguments[0]) for one in requests))
        self.now += self.table[len(requests)]
        if len(requests) >= self.splits_at:
            self.batching._fits = len(requests) // 2


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(backend: Timed, inputs: int = 64, **protocol: Any) -> tuple[Any, Any, Any, Any]:
        monkeypatch.setattr(profiling, "perf_counter", lambda: backend.now)
        workload = Workload("embed", tuple((str(k),) for k in range(inputs)), TimingProtocol(**protocol))
        one = profiling._Measured(backend, workload, backend.meter)  # type: ignore[arg-type]
        single = one.batches(1)
        return single, *profiling._best(one, single)

    return run


def test_it_goes_on_until_there_are_enough_iterations_and_enough_seconds(search: Callable[..., Any]) -> None:
    few, *_ = search(Timed({1: 4.0, 2: 8.0, 4: 16.0}), warm_up=2)
    assert few.seconds == (4.0,) * 10
    many, *_ = search(Timed({1: 0.5, 2: 1.0, 4: 2.0}), warm_up=2)
    assert len(many.seconds) == 20


def test_each_iteration_has_other_inputs_and_none_is_known(search: Callable[..., Any]) -> None:
    backend = Timed({1: 1.0, 2: 2.0})
    search(backend, inputs=3, warm_up=1)
    assert backend.calls[:8] == ["forget", ("0",), "forget", ("1",), "forget", ("2",), "forget", ("0",)]


def test_the_search_ends_where_larger_batches_are_no_faster(search: Callable[..., Any]) -> None:
    _, best, searched, ended = search(Timed({1: 1.0, 2: 2.5, 4: 2.0, 8: 4.0, 16: 9.0}))
    assert searched == ((1, 1.0), (2, 0.8), (4, 2.0), (8, 2.0), (16, 16 / 9))
    assert best.batch_size == 4 and len(best.seconds) == 10 and best.items_per_second == 2.0
    assert ended == "2 larger sizes in a row were no faster"


def test_one_at_a_time_may_be_best_and_is_not_measured_again(search: Callable[..., Any]) -> None:
    single, best, _, _ = search(Timed({1: 1.0, 2: 3.0, 4: 6.0}))
    assert best is single


@pytest.mark.parametrize(
    ("backend", "inputs", "sizes", "ended"),
    [
        (Timed({1: 1.0, 2: 1.0, 4: 1.0}), 5, [1, 2, 4], "there are no more inputs"),
        (Timed({1: 1.0, 2: 1.0}, asked=3), 64, [1, 2], "no larger batch is allowed"),
        (Timed({1: 1.0}, asked=1), 64, [1], "no larger batch is allowed"),
        (Timed({1: 40.0, 2: 41.0}), 64, [1], "an iteration of the next size would take more than 60 s"),
        (Timed({1: 1.0, 2: 1.0}, ram={2: 1e12}), 64, [1, 2], "main memory is nearly used up"),
        (Timed({2**k: 1.0 for k in range(7)}), 900, [1, 2, 4, 8, 16, 32, 64], "on a CPU nothing larger than 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_bounds_the_search(
    search: Callable[..., Any], backend: Timed, inputs: int, sizes: list[int], ended: str
) -> None:
    _, _, searched, said = search(backend, inputs)
    assert [size for size, _ in searched] == sizes
    assert said.startswith(ended)


def test_a_batch_that_did_not_fit_is_no_candidate(search: Callable[..., Any]) -> None:
    backend = Timed({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})
    backend.splits_at = 4
    _, best, searched, ended = search(backend)
    assert [size for size, _ in searched] == [1, 2] and best.batch_size == 2
    assert ended == "no memory for 4"


# --- backends


def test_nothing_is_stored_known_or_counted_afterwards(
    images: Callable[..., list[Any]], embed_requests: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TinyBackend(device="cpu", batch_size=8)
    refs = images(4)
    backend.embed(embed_requests(refs[:1]))
    before = {name: value for name, value in vars(backend).items() if name != "meter"}
    written: list[Any] = []
    monkeypatch.setattr(type(backend.store), "put", lambda *given: written.append(given))
    found = measured(backend, "classify", [(ref, LABELS) for ref in refs])
    assert not written
    assert {name: value for name, value in vars(backend).items() if name != "meter"} == before
    assert (backend.images_encoded, backend.texts_encoded) == (1, 0)
    assert backend.meter.seconds("encode_images") > 0  # that of the first image alone
    assert sum(batch.items for batch in backend.meter.batches["encode_images"]) == 1
    assert found.load_seconds == backend.meter.seconds("load") > 0


def test_the_profile_of_a_dual_encoder(images: Callable[..., list[Any]]) -> None:
    backend = TinyBackend(device="cpu")
    found = measured(backend, "classify", [(ref, LABELS) for ref in images(4)])
    assert found.single.batch_size == 1 and len(found.single.seconds) == 3
    # Phrases are encoded once, while it warms up.
    assert set(found.single.stages) == {"decode", "encode_images"}
    for k, whole in enumerate(found.single.seconds):
        assert 0 < sum(values[k] for values in found.single.stages.values()) < whole
    assert found.parameters == found.parameters_active == sum(p.numel() for p in backend.tiny.parameters())
    assert found.weights_memory_mib == footprint(backend.tiny).bytes / 2**20
    assert found.weights_disk_mib == backend.checkpoint.weights[0].stat().st_size / 2**20
    assert found.gflops_per_item is not None and found.gflops_per_item > 0
    assert found.single.memory["vram_allocated_mib"] is None and "no GPU" in found.single.memory["vram_reason"]
    assert found.single.memory["peak_ram_mib"] > 0
    assert not found.reasons


@pytest.mark.parametrize(("kind", "cls"), [("llama", LanguageModelBackend), ("t5", LanguageModelBackend)])
def test_a_generator_writes_as_many_tokens_as_asked_for(kind: str, cls: Any, tiny_model: Callable[[str], Path]) -> None:
    backend = cls(pretrained=str(tiny_model(kind)), device="cpu")
    found = measured(backend, "generate_until", [(f"the heart {k}",) for k in range(4)])
    assert found.single.tokens == (6, 6, 6)
    assert found.best.tokens == (6 * found.best.batch_size,) * len(found.best.seconds)
    assert len(found.single.first_token_seconds) == 3
    assert all(value > 0 for value in found.single.first_token_seconds)


def test_a_model_that_sees_opens_its_images_each_time(
    tiny_model: Callable[[str], Path], images: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medvlm_harness.model_backends import vlm

    opened: list[Any] = []
    real = vlm.open_reference
    monkeypatch.setattr(vlm, "open_reference", lambda ref: opened.append(ref) or real(ref))
    backend = VlmBackend(pretrained=str(tiny_model("llava")), device="cpu", precision="fp32", batch_size=1)
    (ref,) = images(1)
    found = measured(backend, "generate_until", [("<image>\nFindings:", {"visual": [ref]})])
    assert found.single.tokens == (6, 6, 6)
    # Warm-up, three iterations of two answers each, and two answers for the operations.
    assert len(opened) == 1 + 3 * 2 + 2


def test_a_text_encoder_is_measured_by_its_vectors(tiny_model: Callable[[str], Path]) -> None:
    backend = TextEncoderBackend(pretrained=str(tiny_model("bert")), device="cpu")
    found = measured(backend, "embed", [(TextRef(f"the heart {'is normal ' * k}"),) for k in range(4)])
    assert set(found.single.stages) == {"encode_texts"}


def test_a_workload_without_inputs_loads_nothing() -> None:
    backend = TinyBackend(device="cpu")
    assert profile(backend, Workload("embed", (), QUICK)) is None
    assert not backend.loaded


# --- operations


def test_operations_of_a_transformer_equal_the_closed_form() -> None:
    width, tokens, heads, layers = 64, 10, 4, 2
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, norm_first=False)
    network = nn.TransformerEncoder(layer, layers).eval()
    with count_flops() as counter, torch.inference_mode():
        network(torch.zeros(1, tokens, width))
    # Projections 4 d^2 and the two of the feed-forward 8 d^2 per token; attention twice t^2 d; each product counts two.
    assert counter.get_total_flops() == layers * 2 * (12 * width**2 * tokens + 2 * tokens**2 * width)
    assert torch.backends.mha.get_fastpath_enabled()


def test_operations_of_rounded_weights_are_not_known(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LanguageModelBackend(pretrained=str(tiny_model("llama")), device="cpu")
    monkeypatch.setattr(profiling, "footprint", lambda model: SimpleNamespace(**FOOT))
    found = measured(backend, "generate_until", [("the heart",)])
    assert found.gflops_per_item is None and "rounded" in found.reasons["gflops_per_item"]


FOOT = {"parameters": 5, "trainable": 0, "quantized": 3, "bytes": 2**20}


def test_of_a_mixture_of_experts_those_count_that_a_token_is_sent_to() -> None:
    class Mixture(nn.Module):
        config = SimpleNamespace(num_experts_per_tok=2, num_local_experts=8)

        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(10, 10, bias=False)
            self.mlp = nn.Module()
            self.mlp.experts = nn.ModuleList(nn.Linear(10, 4, bias=False) for _ in range(8))

    model = Mixture()
    assert active_parameters(model, footprint(model)) == 100 + 2 * 40
    dense = nn.Linear(10, 10)
    assert active_parameters(dense, footprint(dense)) == 110


def test_every_backend_forgets_what_it_remembers() -> None:
    from importlib import import_module

    from medvlm_harness import plugin

    for target in plugin.model_targets().values():
        module, _, name = target.partition(":")
        backend = getattr(import_module(module), name)
        if issubclass(backend, TorchBackend):
            assert "profile" in backend.CAPABILITIES and backend.REMEMBERED, name
