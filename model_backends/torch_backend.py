"""What every backend that runs in torch inherits: device, precision, batch size, the store, and loading only if needed.

A model that is constructed has read no weights. Its identity comes from the bytes of its files; what it answered before
comes from the store; it is loaded at the first answer that is not there.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lm_eval.api.instance import Instance

from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.adapters import find_adapter
from medvlm_harness.model_backends.allocation import keep_freed_memory
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.model_backends.batching import BatchSize
from medvlm_harness.model_backends.cards import ModelCard, card_beside
from medvlm_harness.model_backends.catalogue import find, published_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.first_load import FIRST_LOADS, compare_with_first_load, refuse_other_bytes
from medvlm_harness.model_backends.footprint import Footprint, footprint
from medvlm_harness.model_backends.identity import code_sha256, combined_sha256, library_versions, state_sha256
from medvlm_harness.model_backends.image_preparation import AS_PUBLISHED, ImagePreparation
from medvlm_harness.model_backends.memory_watch import MemoryWatch
from medvlm_harness.model_backends.meter import Meter
from medvlm_harness.model_backends.precision import choose_precision, dtype_of
from medvlm_harness.model_backends.quantization import Quantization, check_rounded, find_quantization, quantize_loaded
from medvlm_harness.requests import Profile
from medvlm_harness.store import Space, Store, open_store

__all__ = ["TorchBackend", "pick_device"]

_log = logging.getLogger("lm_eval.medvlm")

Answer = TypeVar("Answer")
FACTS_INPUT = "00" * 32  # facts are about the model: they have no input


class TorchBackend(MedicalLM):
    """A model in torch, loaded when it is first needed.

    A subclass names its files (`locate`), loads them (`load`) and says what of its preprocessing is not in them.

    `card=NAME` says that a local copy is a model of the catalogue, whose card the results then have. What
    `quantization=` and `peft=` take: `quantization.py`, `adapters.py`.
    """

    DEFAULT_PRECISION: ClassVar[str] = "fp32"
    # Attributes that `load` sets, and that answers or results need: kept in the store beside the answers.
    FACTS: ClassVar[tuple[str, ...]] = ("parameters", "transform", "held")
    VIRTUAL_TOKENS: ClassVar[bool] = False  # whether `peft=` may be prompt learning: the model is called as a whole
    parameters: int | None = None
    held: Mapping[str, int] | None = None  # the `Footprint` of the loaded model
    transform: str | None = None  # how pixels are prepared, for people
    model: torch.nn.Module | None = None  # what `load` built; cast and moved here
    preparation: ImagePreparation = AS_PUBLISHED  # of pictures, before the model's own preprocessing

    def __init__(
        self,
        *,
        pretrained: str,
        device: str | None = None,
        precision: str | None = None,
        quantization: str | None = None,
        peft: str | None = None,
        store: str = "auto",
        card: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.pretrained = str(pretrained)
        self.quantization, self.adapter = find_quantization(quantization), find_adapter(peft)
        self._device = pick_device(device, self.ranks.local_rank)
        self.meter, self.memory = Meter(self._device), MemoryWatch(self._device)
        self.checkpoint = self.locate()
        self.card = self._published(card)
        self.precision_asked = str(precision or self.DEFAULT_PRECISION)
        self.precision = self.choose_precision(self.precision_asked)
        self.dtype = dtype_of(self.precision)
        self.batch_size_asked = self.batch_size
        if self.quantization is not None and self.quantization.alone:
            self._compute_one_by_one(self.quantization)
        self.batching = BatchSize(self.batch_size, self.max_batch_size)
        self.loaded = self._learned = False
        self._digests: dict[Path, Future[str]] = {}
        self._store_option = str(store)
        self._complete_card()

    # --- for subclasses

    def locate(self) -> Checkpoint:
        """The files of `self.pretrained`, without reading them.

        Raises:
            UserError: if they are not there.
        """
        return Checkpoint()

    @abstractmethod
    def load(self) -> None:
        """Load the checkpoint in float32; set `self.model` and what `FACTS` names.

        Raises:
            UserError: if it does not fit; every missing or unexpected key is a failure.
        """

    def preprocessing(self) -> Mapping[str, Any]:
        """Constants that decide pixels or tokens and stand in no file of the checkpoint; plain JSON."""
        return {}

    def choose_precision(self, asked: str) -> str:
        """The name of the format that is computed in; reads settings at most, never the weights."""
        return choose_precision(asked, self._device)

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model that `load` built, on its device and in its precision, rounded and with its adapter."""
        return self.finish(model.to(self.device, self.dtype))

    def finish(self, model: torch.nn.Module) -> torch.nn.Module:
        """Round the weights of a model on its device, in its precision, and put the adapter on.

        Layers are replaced in place: whoever holds the model, or a part of it, has them too.

        Raises:
            UserError: if there is nothing to round, or the adapter does not fit.
        """
        if self.quantization is not None:
            quantize_loaded(self.quantization, model, self.dtype)
            check_rounded(self.quantization, model, self.card.name)
        if self.adapter is None:
            return model
        if self.adapter.is_prompt_learning and not self.VIRTUAL_TOKENS:
            raise UserError(
                f"{self.adapter.folder} holds virtual tokens (prompt or prefix tuning), which {self.card.name} "
                f"({self.card.family}) does not take: use an adapter in layers, such as LoRA."
            )
        if self.checkpoint.weights:  # else they are the loaded ones, whose hash `adapter_identity` compares
            self.adapter.check_base(self.weights)
        adapted = self.adapter.put_on(model)
        if self.parameters is not None:
            self.parameters += self.adapter.parameters
        return adapted

    def quantization_identity(self) -> Mapping[str, Any] | None:
        """How weights are rounded, and by which library; None if they are not."""
        return None if self.quantization is None else self.quantization.identity()

    def adapter_identity(self) -> Mapping[str, Any] | None:
        """Hash of the adapter that is put on the model, and by which library; None without one."""
        if self.adapter is None:
            return None
        self.adapter.check_base(self.weights)
        return self.adapter.identity()

    # --- loading

    def ensure_loaded(self) -> None:
        """Load the model if it is not; in its precision, on its device, in evaluation mode."""
        if self.loaded:
            return
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # some kernels run on the current one, wherever their tensors are
        if self.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions: 10 bits of 23
        with self.meter.stage("load", 1):
            self.load()
            if self.model is not None:
                self._loaded_weights = None if self.checkpoint.weights else state_sha256(self.model)
                self.model = self.place(self.model).eval()
                self.held = asdict(footprint(self.model))
        self.loaded = True

    def learn(self) -> None:
        """Set what `FACTS` names: from the store, else by loading the model."""
        if self._learned:
            return
        space = self.space("facts")
        stored = self.recall(space, [FACTS_INPUT], json.loads).get(FACTS_INPUT)
        if stored is not None and not self.loaded:
            for name in self.FACTS:
                setattr(self, name, stored[name])
        else:
            self.ensure_loaded()
            facts = {name: getattr(self, name) for name in self.FACTS}
            self.keep(space, {FACTS_INPUT: json.dumps(facts).encode()})
        self._learned = True
        self._complete_card()

    def _published(self, name: str | None) -> ModelCard:
        """The catalogue's card: the one asked for (`card=NAME`), or that of the Hub id in `pretrained`.

        Raises:
            UserError: if there is none of that name, or it is another backend's.
        """
        backend = type(self).card.name
        if name is not None:
            entry = find(name)
            if entry.run.model != backend:
                runs = "nothing here" if entry.run.model is None else f"--model {entry.run.model}"
                raise UserError(f"card={name} is a model that {runs} runs, not --model {backend}.")
            return entry.card
        source = self.card.source
        known = None if source is None else published_card(backend, source.location, source.revision)
        return known or self.card

    def _complete_card(self) -> None:
        """Add what was measured, and what the `medvlm_card.yaml` beside the weights says.

        What is not known of an adapter's training data, is not known of the whole.
        """
        parameters = self.card.parameters if self.parameters is None else self.parameters
        self.card = replace(self.card, parameters=parameters, preprocessing=self.transform or self.card.preprocessing)
        if self.checkpoint.weights:
            self.card = card_beside(self.checkpoint.weights[0], self.card)
        if self.adapter is not None:
            added = card_beside(self.adapter.folder, replace(self.card, trained_on=None)).trained_on
            base = self.card.trained_on
            both = None if added is None or base is None else (*base, *(one for one in added if one not in base))
            self.card = replace(self.card, trained_on=both)

    # --- the store

    def begin(self, background: Executor) -> None:
        """Hash the weights: of gigabytes it takes seconds."""
        if "weights" not in vars(self):
            self._digests = {path: background.submit(file_sha256, path) for path in self.checkpoint.weights}

    @cached_property
    def store(self) -> Store | None:
        """Opened when first asked; None if it is off."""
        return open_store(self._store_option)

    @cached_property
    def weights(self) -> dict[str, str]:
        """File name -> sha256 of the checkpoint's weights; of a model without local files, of its tensors."""
        if self.checkpoint.weights:
            begun = self._digests
            hashes = {path: begun[path].result() if begun else file_sha256(path) for path in self.checkpoint.weights}
            found = {self.checkpoint.label(path): digest for path, digest in hashes.items()}
        else:
            self.ensure_loaded()
            state = getattr(self, "_loaded_weights", None)
            found = {} if state is None else {"state": state}
        self._compare_with_source(found)
        return found

    def _compare_with_source(self, found: Mapping[str, str]) -> None:
        """Refuse bytes that the card does not pin; tell of others than the source had at its first load here."""
        source = self.card.source
        if source is None:
            return
        refuse_other_bytes(self.card.name, source, found)
        if self.store is not None and self.ranks.rank == 0:
            for line in compare_with_first_load(source, found, self.store.path.with_name(FIRST_LOADS)):
                _log.warning("%s", line)

    @cached_property
    def identity(self) -> dict[str, Any] | None:
        """All that decides this model's answers beside the input; None if its weights cannot be told."""
        if not self.weights:
            return None
        return {
            "weights": list(self.weights.values()),
            "settings": {path.name: file_sha256(path) for path in self.checkpoint.settings},
            "options": dict(self.checkpoint.options),
            "preparation": str(self.preparation),
            "preprocessing": dict(self.preprocessing()),
            "precision": self.precision,
            "quantization": self.quantization_identity(),
            "adapter": self.adapter_identity(),
            "code": code_sha256(type(self)),
            "libraries": library_versions(),
        }

    def space(self, kind: str, *, prompt: str = "", perturbation: str = "") -> Space | None:
        """Where answers of a kind are kept; None if they are not."""
        if self.store is None or self.identity is None:
            return None
        return Space(kind, self.identity, prompt, perturbation, name=self.card.name)

    def recall(self, space: Space | None, inputs: Iterable[str], read: Callable[[bytes], Answer]) -> dict[str, Answer]:
        """What is stored for these inputs."""
        if space is None or self.store is None:
            return {}
        with self.meter.stage("store") as batch:
            found = {key: read(value) for key, value in self.store.get(space, inputs).items()}
            batch.items = len(found)
        return found

    def keep(self, space: Space | None, answers: Mapping[str, bytes]) -> None:
        """Store answers, in one transaction."""
        if space is not None and self.store is not None:
            with self.meter.stage("store", len(answers)):
                self.store.put(space, answers)

    # --- what it costs

    REMEMBERED: ClassVar[tuple[str, ...]] = ()  # attributes: dicts of answers by their inputs

    def profile(self, requests: Sequence[Instance]) -> list[Profile | None]:
        """What workloads cost on this machine, measured by requests whose answers are neither stored nor kept."""
        from medvlm_harness.model_backends.profiling import profile

        return [profile(self, request.arguments[1]) for request in requests]

    def forget(self) -> None:
        """Forget what was answered in this process, so that the same inputs are computed again."""
        for name in self.REMEMBERED:
            setattr(self, name, {})

    def use_batch_size(self, size: int) -> None:
        """Take so many items in a forward pass from here on, unless each is to be computed alone."""
        alone = self.quantization is not None and self.quantization.alone
        self.batching = BatchSize(1 if alone else size)

    def parts(self) -> list[TorchBackend]:
        """The backends that hold its weights: itself, and frozen ones that it is built on."""
        return [self]

    # --- results

    @property
    def weights_sha256(self) -> str | None:
        """One hash of all weights; None if they cannot be told."""
        hashes = sorted(self.weights.values())
        return combined_sha256(hashes) if len(hashes) > 1 else next(iter(hashes), None)

    def describe(self) -> dict[str, Any]:
        """Card, hashes of the weights, precision, quantisation, adapter, batch size and device."""
        self.learn()
        return {
            "card": self.card.to_dict(),
            "weights_sha256": self.weights_sha256,
            "weight_files_sha256": self.weights if self.checkpoint.weights else {},
            "precision": self.precision,
            "precision_asked": self.precision_asked,
            "weights_bytes": None if self.held is None else self.held["bytes"],  # in memory
            "quantization": self._describe_quantization(),
            "adapter": self.adapter_identity(),
            "batch_size": self.batching.found,
            "device": str(self.device),
            "store": "off" if self.store is None else "on",
        }

    def _describe_quantization(self) -> dict[str, Any] | None:
        """The way, the rounded share of the matrices and of all weights, and the bytes that the model takes."""
        identity = self.quantization_identity()
        if identity is None or self.held is None:
            return None
        held = Footprint(**self.held)
        return {
            **identity,
            "share": held.quantized_share,
            "parameters_share": held.quantized / held.parameters,
            "bytes": held.bytes,
        }

    def _compute_one_by_one(self, way: Quantization) -> None:
        but = ", but for images" if way.batches_images(self._device) else ""
        if (self.batch_size or 1) > 1:
            _log.warning("quantization=%s: batch_size=%s is not used, see below%s", way.name, self.batch_size, but)
        _log.info("quantization=%s: items are computed one by one, else they would change each other%s", way.name, but)
        self.batch_size = 1


def pick_device(device: str | None, local_rank: int = 0) -> torch.device:
    """The device asked for; lm-eval says cuda:0 when nothing was asked, which without CUDA means: choose.

    Of several processes on one machine each takes the GPU of its number; more processes than GPUs share them.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device in (None, "", "auto", "cuda", "cuda:0") or (str(device).startswith("cuda") and not gpus):
        return torch.device(f"cuda:{local_rank % gpus}" if gpus else "cpu")
    try:
        return torch.device(str(device))
    except RuntimeError as error:
        raise UserError(f"Expected device to be cpu, cuda, cuda:N or mps, but got {device!r}.") from error
