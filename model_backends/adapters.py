"""Adapters of PEFT put on a loaded model: `peft=DIR`.

What PEFT puts into layers (LoRA and its kind) is put there in place: whoever holds a tower of the model has it too.
"""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.attention import Attention
from medvlm_harness.model_backends.cards import CARD_FILE, read_mapping
from medvlm_harness.model_backends.identity import check_weights, combined_sha256
from medvlm_harness.model_backends.towers import refuse_key_mismatch

__all__ = ["Adapter", "find_adapter", "keep_cast_dtype"]

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in PEFT's order
# Of an adapter's configuration: where it was trained, which decides no answer.
_NOT_ANSWERING = ("base_model_name_or_path", "revision", "peft_version")
# Virtual tokens before the input, which stand in no layer.
_PROMPT_LEARNING = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"})


class Adapter:
    """A folder as PEFT saves it."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder, self.weights = folder, weights
        self.parameters = 0  # known once it is put on a model

    def identity(self) -> dict[str, str]:
        """Hash of weights and settings, and PEFT's version."""
        settings = {k: v for k, v in self._config().items() if k not in _NOT_ANSWERING}
        digest = combined_sha256([self._weights_sha256, json.dumps(settings, sort_keys=True)])
        return {"sha256": digest, "peft": importlib.metadata.version("peft")}

    @cached_property
    def _weights_sha256(self) -> str:
        return file_sha256(self.weights)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether it works by virtual tokens, so that only a model called through PEFT's wrapper has it."""
        return self._config().get("peft_type") in _PROMPT_LEARNING

    def check_base(self, weights: Mapping[str, str]) -> None:
        """Refuse a base with other weights than the adapter was trained on, where the card beside it says which.

        Args:
            weights: of the base, file -> sha256.
        """
        path = self.folder / CARD_FILE
        training = read_mapping(path).get("training") if path.is_file() else None
        bases = training.get("base_models") if isinstance(training, Mapping) else None
        base = bases.get("model") if isinstance(bases, Mapping) else None
        recorded = base.get("weights_sha256") if isinstance(base, Mapping) else None
        if isinstance(recorded, Mapping) and recorded:
            check_weights(f"The base of the adapter {self.folder}", recorded, weights, option="pretrained")

    def put_on(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with the adapter, not merged; the vocabulary stays as the checkpoint has it.

        Raises:
            UserError: if it does not fit the model; every missing or unexpected key is a failure.
        """
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights

        self._refuse_replaced(model)
        try:
            with warnings.catch_warnings():
                # Nothing is merged here, which is all that it says of layers rounded by torchao.
                warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
                adapted = PeftModel.from_pretrained(model, str(self.folder))
            stored = load_peft_weights(str(self.folder), device="cpu")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"The adapter {self.folder} does not fit {type(model).__name__}: {line}") from error
        # PEFT itself only warns, and leaves what is missing as it was made: an adapter that does nothing.
        expected = get_peft_model_state_dict(adapted)
        target = f"{type(model).__name__} with its adapter_config.json"
        refuse_key_mismatch(str(self.folder), target, expected.keys() - stored.keys(), stored.keys() - expected.keys())
        self.parameters = sum(value.numel() for value in expected.values())
        module: torch.nn.Module = adapted
        keep_cast_dtype(module)
        return module

    def _refuse_replaced(self, model: torch.nn.Module) -> None:
        """Refuse an adapter for attention layers that rounding has replaced."""
        replaced = [name for name, module in model.named_modules() if isinstance(module, Attention)]
        if not replaced:
            return
        from peft import PeftConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        try:
            config = PeftConfig.from_pretrained(str(self.folder))
        except (OSError, ValueError, KeyError, TypeError):
            return  # PEFT says what is wrong with it when it is put on
        hit = next((name for name in replaced if check_target_module_exists(config, name)), None)
        if hit is not None:
            raise UserError(
                f"The adapter {self.folder} is for {hit} as a whole (torch.nn.MultiheadAttention), whose projections "
                "quantization= takes apart: leave out quantization=, or train one on other layers (c_fc, c_proj)."
            )

    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.folder / CONFIG}: not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.folder / CONFIG}: expected an object, but got {config!r}.")
        return config


def keep_cast_dtype(model: torch.nn.Module) -> None:
    """Let an adapter's layers say what inputs are cast to where the rounded layers below them do; open_clip asks."""
    for layer in model.modules():
        dtype = getattr(getattr(layer, "base_layer", None), "int8_original_dtype", None)
        if dtype is not None:
            layer.int8_original_dtype = dtype


def find_adapter(asked: str | None) -> Adapter | None:
    """The adapter of a folder; None where none is asked for.

    Raises:
        UserError: if the folder is not what PEFT saves.
    """
    if not asked:
        return None
    folder = Path(asked).expanduser()
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not (folder / CONFIG).is_file():
        raise UserError(f"Expected peft to be a folder with {CONFIG} and {WEIGHTS[0]}, but got {asked}.")
    return Adapter(folder, weights)
