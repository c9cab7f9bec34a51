"""What every backend that runs in torch inherits: device, precision, batch size, the store, and loading only if needed.

A model that is constructed has read no weights. Its identity comes from the bytes of its files; what it answered before
comes from the store; it is loaded at the first answer that is not there.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.allocation import keep_freed_memory
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.model_backends.batching import BatchSize
from medvlm_harness.model_backends.cards import ModelCard, card_beside
from medvlm_harness.model_backends.catalogue import find, published_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.first_load import FIRST_LOADS, compare_with_first_load, refuse_other_bytes
from medvlm_harness.model_backends.identity import code_sha256, combined_sha256, library_versions, state_sha256
from medvlm_harness.model_backends.image_preparation import AS_PUBLISHED, ImagePreparation
from medvlm_harness.model_backends.precision import choose_precision, dtype_of
from medvlm_harness.store import Space, Store, open_store

__all__ = ["TorchBackend", "pick_device"]

_log = logging.getLogger("lm_eval.medvlm")

Answer = TypeVar("Answer")
FACTS_INPUT = "00" * 32  # facts are about the model: they have no input


class TorchBackend(MedicalLM):
    """A model in torch, loaded when it is first needed.

    A subclass names its files (`locate`), loads them (`load`) and says what of its preprocessing is not in them.

    `card=NAME` says that a local copy is a model of the catalogue, whose card the results then have.
    """

    DEFAULT_PRECISION: ClassVar[str] = "fp32"
    # Attributes that `load` sets, and that answers or results need: kept in the store beside the answers.
    FACTS: ClassVar[tuple[str, ...]] = ("parameters", "transform")
    parameters: int | None = None
    transform: str | None = None  # how pixels are prepared, for people
    model: torch.nn.Module | None = None  # what `load` built; cast and moved here
    preparation: ImagePreparation = AS_PUBLISHED  # of pictures, before the model's own preprocessing

    def __init__(
        self,
        *,
        pretrained: str,
        device: str | None = None,
        precision: str | None = None,
        store: str = "auto",
        card: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.pretrained = str(pretrained)
        self._device = pick_device(device, self.ranks.local_rank)
        self.checkpoint = self.locate()
        self.card = self._published(card)
        self.precision_asked = str(precision or self.DEFAULT_PRECISION)
        self.precision = self.choose_precision(self.precision_asked)
        self.dtype = dtype_of(self.precision)
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
        """The model that `load` built, on its device and in its precision."""
        return model.to(self.device, self.dtype)

    def quantization_identity(self) -> Mapping[str, Any] | None:
        """How weights are rounded after loading, and by which library; None if they are not."""
        return None

    def adapter_identity(self) -> Mapping[str, Any] | None:
        """Hash of the adapter that is put on the model, and by which library; None without one."""
        return None

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
        self.load()
        if self.model is not None:
            self._loaded_weights = None if self.checkpoint.weights else state_sha256(self.model)
            self.model = self.place(self.model).eval()
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
        """Add what was measured, and what the `medvlm_card.yaml` beside the weights says."""
        parameters = self.card.parameters if self.parameters is None else self.parameters
        self.card = replace(self.card, parameters=parameters, preprocessing=self.transform or self.card.preprocessing)
        if self.checkpoint.weights:
            self.card = card_beside(self.checkpoint.weights[0], self.card)

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
        return {key: read(value) for key, value in self.store.get(space, inputs).items()}

    def keep(self, space: Space | None, answers: Mapping[str, bytes]) -> None:
        """Store answers, in one transaction."""
        if space is not None and self.store is not None:
            self.store.put(space, answers)

    # --- results

    @property
    def weights_sha256(self) -> str | None:
        """One hash of all weights; None if they cannot be told."""
        hashes = sorted(self.weights.values())
        return combined_sha256(hashes) if len(hashes) > 1 else next(iter(hashes), None)

    def describe(self) -> dict[str, Any]:
        """Card, hashes of the weights, precision, batch size and device."""
        self.learn()
        return {
            "card": self.card.to_dict(),
            "weights_sha256": self.weights_sha256,
            "weight_files_sha256": self.weights if self.checkpoint.weights else {},
            "precision": self.precision,
            "precision_asked": self.precision_asked,
            "batch_size": self.batching.found,
            "device": str(self.device),
            "store": "off" if self.store is None else "on",
        }


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
