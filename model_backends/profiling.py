"""What a workload costs on this machine: the answer to a `profile` request.

The protocol is that of optimum-benchmark's inference scenario (0.6): warm-up, then iterations until there are enough of
them and they took long enough, the prefill of generators apart from their decoding, peaks of memory beside. Where it
differs: inputs are a task's own images and texts instead of random tensors of one shape, each iteration has others, and
an iteration is a whole request, from opening the file to the answer; the stages within say what the forward pass takes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medvlm_harness.model_backends.batching import CPU_SIZE
from medvlm_harness.model_backends.footprint import Footprint, footprint
from medvlm_harness.model_backends.hardware import hardware
from medvlm_harness.model_backends.memory_watch import MIB, available_ram_mib
from medvlm_harness.model_backends.meter import Meter
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.requests import Profile, TimedBatches, Workload

__all__ = ["active_parameters", "count_flops", "profile"]

_log = logging.getLogger("lm_eval.medvlm")

GAIN = 1.02  # a larger batch must be faster by so much: less is noise
LONGEST_ITERATION = 60.0  # seconds that the search lets one iteration take
SEARCH_ITERATIONS = 3
PATIENCE = 2  # sizes that may be no faster, one after the other: three iterations are few
COUNTED_ITEMS = 4  # texts are of different lengths
NOT_COUNTED = "torch counts no operations of rounded weights"


def profile(backend: TorchBackend, workload: Workload) -> Profile | None:
    """Measure; None for a workload without inputs.

    Args:
        backend: loaded if it is not yet. What it stores, knows and counts is afterwards as it was before.
        workload: its inputs are taken in turn; a batch is no larger than their number.
    """
    if not workload.inputs:
        return None
    backend.ensure_loaded()
    load_seconds = backend.meter.seconds("load")
    reasons = {} if load_seconds else {"load_seconds": "the model was loaded before this run began"}
    with _aside(backend) as meter:
        measured = _Measured(backend, workload, meter)
        single = measured.batches(1)
        best, searched, ended = _best(measured, single)
        gflops = _gflops(measured)
    if gflops is None:
        reasons["gflops_per_item"] = NOT_COUNTED
    feet = [footprint(model) for model in _models(backend)]
    disk = _disk_mib(backend)
    if disk is None:
        reasons["weights_disk_mib"] = "the weights lie in no local file"
    return Profile(
        single=single,
        best=best,
        searched=searched,
        search_ended=ended,
        load_seconds=load_seconds or None,
        parameters=sum(one.parameters for one in feet),
        parameters_active=sum(map(active_parameters, _models(backend), feet)),
        parameters_trainable=sum(one.trainable for one in feet),
        weights_memory_mib=sum(one.bytes for one in feet) / MIB,
        weights_disk_mib=disk,
        gflops_per_item=gflops,
        hardware=hardware(backend.device),
        reasons=reasons,
    )


@contextmanager
def _aside(backend: TorchBackend) -> Iterator[Meter]:
    """Let nothing be stored, and whatever is kept or counted meanwhile be as before afterwards."""
    meter = Meter(backend.device)
    before = [(part, dict(part.__dict__)) for part in backend.parts()]
    try:
        for part, known in before:
            part.__dict__.update({name: dict(value) for name, value in known.items() if type(value) is dict})
            part.__dict__.update(store=None, meter=meter)
        yield meter
    finally:
        for part, known in before:
            part.__dict__.clear()
            part.__dict__.update(known)


class _Measured:
    """A backend that answers a workload's requests, batch by batch."""

    def __init__(self, backend: TorchBackend, workload: Workload, meter: Meter) -> None:
        self.backend, self.workload, self.protocol, self.meter = backend, workload, workload.protocol, meter
        self.generates = workload.request == "generate_until"
        self._place = 0

    def batches(self, size: int, *, quick: bool = False) -> TimedBatches:
        """Warm up, then measure: as long as the protocol says, or, to compare sizes, a few iterations."""
        _log.info("measuring batches of %d%s", size, " (a few, to compare sizes)" if quick else "")
        self.backend.use_batch_size(size)
        self.backend.memory.reset()
        for _ in range(1 if quick else self.protocol.warm_up):
            self.answer(self._next(size), self.protocol.new_tokens)
        wanted = min(SEARCH_ITERATIONS, self.protocol.iterations) if quick else self.protocol.iterations
        least = 0.0 if quick else self.protocol.seconds
        seconds: list[float] = []
        first: list[float] = []
        tokens: list[int] = []
        stages: dict[str, list[float]] = {}
        while len(seconds) < wanted or sum(seconds) < least:
            inputs = self._next(size)
            if self.generates and not quick:
                first.append(self.answer(inputs, 1))
            self.meter.take()
            seconds.append(self.answer(inputs, self.protocol.new_tokens))
            taken = self.meter.take()
            for name, batches in taken.items():
                stages.setdefault(name, []).append(sum(batch.seconds for batch in batches))
            tokens += [sum(batch.tokens or 0 for batch in taken["generate"])] if self.generates else []
        memory = self.backend.memory.peak(anew=True)
        kept = {name: tuple(values) for name, values in stages.items() if len(values) == len(seconds)}
        return TimedBatches(size, tuple(seconds), kept, memory, tuple(first), tuple(tokens))

    def was_split(self) -> bool:
        """Whether memory ran out, so that the backend went on with smaller batches."""
        names = ("batching", "image_batching", "generation_batching")
        batchings = [getattr(self.backend, name, None) for name in names]
        return any(one is not None and one.found != one.asked for one in batchings)

    def answer(self, inputs: Sequence[tuple[Any, ...]], new_tokens: int) -> float:
        """Seconds that the answers to requests take, none of which is known."""
        requests = [
            Instance(self.workload.request, {}, self._arguments(one, new_tokens), k) for k, one in enumerate(inputs)
        ]
        self.backend.forget()
        start = perf_counter()
        getattr(self.backend, self.workload.request)(requests)
        if self.backend.device.type != "cpu":
            torch.accelerator.synchronize(self.backend.device)
        return perf_counter() - start

    def _arguments(self, one: tuple[Any, ...], new_tokens: int) -> tuple[Any, ...]:
        if not self.generates:
            return one
        options = {"until": [], "max_gen_toks": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return (one[0], options, *one[1:])

    def _next(self, size: int) -> list[tuple[Any, ...]]:
        inputs = self.workload.inputs
        chosen = [inputs[(self._place + k) % len(inputs)] for k in range(size)]
        self._place += size
        return chosen


def _best(measured: _Measured, single: TimedBatches) -> tuple[TimedBatches, tuple[tuple[int, float], ...], str]:
    """The batch size with the most items per second among powers of two, what was tried, and why no more was."""
    backend = measured.backend
    on_gpu = backend.device.type == "cuda"
    asked = (backend.batch_size, backend.max_batch_size, measured.protocol.max_batch_size)
    inputs = len(measured.workload.inputs)
    limits = {
        "there are no more inputs": inputs,
        "no larger batch is allowed": min((one for one in asked if one is not None), default=inputs),
        **({} if on_gpu else {f"on a CPU nothing larger than {CPU_SIZE} is tried": CPU_SIZE}),
    }
    limit = min(limits.values())
    ended = next(reason for reason, size in limits.items() if size == limit)
    found, fastest, slower = [single], single, 0
    while 2 * found[-1].batch_size <= limit:
        last = found[-1]
        if 2 * sum(last.seconds) / len(last.seconds) > LONGEST_ITERATION:
            ended = f"an iteration of the next size would take more than {LONGEST_ITERATION:.0f} s"
            break
        grown = last.memory["peak_ram_mib"] - single.memory["peak_ram_mib"]
        if not on_gpu and 2 * grown > available_ram_mib():
            ended = "main memory is nearly used up"  # there the system ends a process without a word
            break
        tried = measured.batches(2 * last.batch_size, quick=True)
        if measured.was_split():
            ended = f"no memory for {2 * last.batch_size}"
            break
        found.append(tried)
        slower = 0 if tried.items_per_second > GAIN * fastest.items_per_second else slower + 1
        fastest = max(fastest, tried, key=lambda one: one.items_per_second)
        if slower == PATIENCE:
            ended = f"{PATIENCE} larger sizes in a row were no faster"
            break
    searched = tuple((one.batch_size, one.items_per_second) for one in found)
    if fastest is single:
        return single, searched, ended
    return measured.batches(fastest.batch_size), searched, ended


def _gflops(measured: _Measured) -> float | None:
    """Operations of one item in billions, a multiplication and an addition counted as two; None if not all count."""
    if any(footprint(model).quantized for model in _models(measured.backend)):
        return None
    measured.backend.use_batch_size(1)
    inputs = measured.workload.inputs[:COUNTED_ITEMS]
    measured.answer(inputs[:1], 1)  # what is encoded once for all items, such as the words of labels
    with count_flops() as counter:
        for one in inputs:
            measured.answer([one], measured.protocol.new_tokens)
    return counter.get_total_flops() / len(inputs) / 1e9


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count matrix products and convolutions by torch's own counter; of fused attention, by its parts.

    Torch counts neither the fused attention of CPUs nor that of nn.MultiheadAttention, so both are taken apart.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def active_parameters(model: torch.nn.Module, whole: Footprint) -> int:
    """Weights that one token goes through: of a mixture of experts, those of the experts that it is sent to."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = getattr(text, "num_experts_per_tok", None)
    every = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if not chosen or not every:
        return whole.parameters
    experts = sum(tensor.numel() for name, tensor in model.named_parameters() if ".experts." in name)
    return whole.parameters - experts + experts * int(chosen) // int(every)


def _models(backend: TorchBackend) -> list[torch.nn.Module]:
    return [part.model for part in backend.parts() if part.model is not None]


def _disk_mib(backend: TorchBackend) -> float | None:
    """The files of the weights, those of an adapter among them."""
    files = {path for part in backend.parts() for path in part.checkpoint.weights}
    files |= set() if backend.adapter is None else {backend.adapter.weights}
    return sum(path.stat().st_size for path in files) / MIB if files else None
