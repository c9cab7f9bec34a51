"""What the backends built by transformers share: finding files, precision, quantisation, adapters, the tokenizer."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.model_backends.cards import Source
from medvlm_harness.model_backends.checkpoints import (
    Checkpoint,
    find_folder,
    gguf_checkpoint,
    tensor_shapes,
    transformers_folder,
)
from medvlm_harness.model_backends.precision import PRECISIONS, choose_precision
from medvlm_harness.model_backends.quantization import loading_options
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.model_backends.towers import refuse_key_mismatch

__all__ = ["TransformersBackend"]

CHECKPOINT_PRECISION = "checkpoint"


class TransformersBackend(TorchBackend):
    """A model that transformers builds without remote code.

    `pretrained=` is a folder as transformers saves it, a name on the Hub (with `model_revision=`), or a GGUF file (also
    a folder with `gguf_file=`), whose blocks are unpacked. `precision=checkpoint` is the format that the weights are
    stored in. bitsandbytes rounds weights while they are read; those of a GGUF file are rounded once they are unpacked.
    """

    def __init__(
        self,
        *,
        model_revision: str | None = None,
        gguf_file: str | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
            raise UserError(f"Expected max_length to be 2 tokens or more, but got {max_length!r}.")
        self.model_revision, self.gguf_file, self.max_length_asked = model_revision, gguf_file, max_length
        super().__init__(**options)
        self.model_class()  # a checkpoint for another backend is refused before anything is read

    # --- for subclasses

    @abstractmethod
    def model_class(self) -> Any:
        """The class of transformers that builds the model, by its `from_pretrained`.

        Raises:
            UserError: if a checkpoint of this kind is for another backend.
        """

    # --- files

    def locate(self) -> Checkpoint:
        """The folder, GGUF file or Hub snapshot that `pretrained` names."""
        path = Path(self.pretrained).expanduser()
        if path.is_file() and path.suffix == ".gguf" and self.gguf_file is None:
            path, self.gguf_file = path.parent, path.name
        name = path.name if path.exists() else self.pretrained.rpartition("/")[2]
        self.folder, published = find_folder(
            str(path) if path.is_dir() else self.pretrained,
            "a folder as transformers saves it, a .gguf file, or a name on the Hub",
            revision=self.model_revision,
            gguf_file=self.gguf_file,
        )
        if published:
            self.card = replace(self.card, source=Source(self.pretrained, self.model_revision))
        if self.gguf_file is not None:
            name = Path(self.gguf_file).stem
        self.card = replace(self.card, name=name)
        if self.gguf_file is not None:
            return gguf_checkpoint(self.folder, self.gguf_file)
        if not (self.folder / "config.json").is_file():
            raise UserError(
                f"Expected {self.folder} to hold config.json (transformers), but it has none. "
                "A GGUF file in it is named by gguf_file=NAME.gguf."
            )
        return transformers_folder(self.folder)

    @property
    def is_gguf(self) -> bool:
        """Whether the weights come in GGUF's blocks."""
        return self.gguf_file is not None

    @property
    def _source(self) -> dict[str, Any]:
        """What every `from_pretrained` is told: this folder, no network, no remote code."""
        gguf = {"gguf_file": self.gguf_file} if self.is_gguf else {}
        return {"local_files_only": True, "trust_remote_code": False, **gguf}

    @cached_property
    def config(self) -> Any:
        """Transformers' configuration."""
        from transformers import AutoConfig

        self._need_gguf()
        with self._one_line("configuration"):
            return AutoConfig.from_pretrained(self.folder, **self._source)

    @cached_property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer."""
        from transformers import AutoTokenizer

        self._need_gguf()
        with self._one_line("tokenizer"):
            return AutoTokenizer.from_pretrained(self.folder, **self._source, **self.tokenizer_options())

    def tokenizer_options(self) -> dict[str, Any]:
        """What the tokenizer is told beside its files."""
        return {}

    def _need_gguf(self) -> None:
        if self.is_gguf and find_spec("gguf") is None:
            raise UserError(
                "A GGUF file needs the package gguf, which is not installed: pip install 'medvlm-harness[gguf]'"
            )

    @contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        # What transformers raises for files that it cannot read, from anywhere down to the parsers.
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise UserError(
                f"Cannot load the {what} of {self.pretrained} with transformers: {first_line(error)}"
            ) from error

    @cached_property
    def max_length(self) -> int:
        """The longest input in tokens: asked for, else as lm-eval finds it in the configuration and the tokenizer."""
        if self.max_length_asked is not None:
            return self.max_length_asked
        from lm_eval.models.utils import resolve_max_length

        return int(resolve_max_length(self.config, self.tokenizer))

    # --- precision

    def choose_precision(self, asked: str) -> str:
        """Adds `checkpoint`: as the weights are stored; those of a GGUF file are unpacked to fp32."""
        if asked != CHECKPOINT_PRECISION:
            return choose_precision(asked, self._device)
        names = {dtype: name for name, dtype in PRECISIONS.items()}
        dtype = torch.float32 if self.is_gguf else self._stored_dtype()
        if dtype not in names:
            raise UserError(
                f"The weights of {self.pretrained} are stored as {dtype}: add precision=fp32, bf16 or fp16."
            )
        return names[dtype]

    def _stored_dtype(self) -> torch.dtype | None:
        """What config.json says, else the first floating tensor of the weights."""
        try:
            written = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.folder / 'config.json'}: not valid JSON: {error}") from error
        parts = [written, written.get("text_config") or {}] if isinstance(written, Mapping) else []
        named = [part.get(key) for part in parts if isinstance(part, Mapping) for key in ("dtype", "torch_dtype")]
        for name in named:
            dtype = getattr(torch, str(name).removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype):
                return dtype
        named_model = [path for path in self.checkpoint.weights if "model" in path.name]
        return _first_dtype((named_model or self.checkpoint.weights)[0])

    def preprocessing(self) -> dict[str, Any]:
        """What is asked of the tokenizer, and where texts are cut."""
        return {"max_length": self.max_length, "tokenizer": self.tokenizer_options()}

    # --- loading

    def load(self) -> None:
        """Read the weights in the precision of the run, round them, put the adapter on."""
        self._need_gguf()
        # Where the device is told, the model comes to lie there, rounded.
        rounded = {} if self.is_gguf else loading_options(self.quantization, self.dtype, self._device)
        options = {**self._source, **(_unpacked() if self.is_gguf else rounded)}
        with self._one_line("model"):
            model, info = self.read(dtype=self.dtype, output_loading_info=True, **options)
        self.check_keys(type(model).__name__, set(info["missing_keys"]), set(info["unexpected_keys"]))
        self.parameters = int(model.num_parameters())
        self.model = self.finish(model if rounded else model.to(self._device))

    def read(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The model with its weights, and transformers' account of the keys that did not fit.

        Args:
            **options: for `from_pretrained`.
        """
        model, info = self.model_class().from_pretrained(self.folder, **self.loading_options(), **options)
        return model, info

    def loading_options(self) -> dict[str, Any]:
        """What a subclass tells `from_pretrained`."""
        return {}

    def check_keys(self, target: str, missing: set[str], unexpected: set[str]) -> None:
        """Refuse weights that were left at random, or that no part of the model took."""
        refuse_key_mismatch(self.pretrained, f"transformers' {target}", sorted(missing), sorted(unexpected))

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """As it is: on its device, in its precision, but for parts that keep another on purpose."""
        return model

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds the longest input."""
        return {**super().describe(), "max_length": self.max_length}


def _unpacked() -> dict[str, Any]:
    """GGUF's blocks as plain weights: without this, numbers would depend on a package being installed (kernels)."""
    import transformers

    config: Callable[..., Any] | None = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _first_dtype(weights: Path) -> torch.dtype | None:
    """The type of the first floating tensor, without reading any."""
    if weights.suffix != ".safetensors":
        found = (value.dtype for value in tensor_shapes(weights).values())
        return next((dtype for dtype in found if dtype.is_floating_point), None)
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        codes = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118  # no mapping
    return next((_SAFETENSORS[code] for code in codes if code in _SAFETENSORS), None)


_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
