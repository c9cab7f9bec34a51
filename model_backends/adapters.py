"""Adapters of PEFT put on a loaded model: `peft=DIR`."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.identity import combined_sha256
from medvlm_harness.model_backends.towers import refuse_key_mismatch

__all__ = ["Adapter", "find_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in PEFT's order
# Of an adapter's configuration: where it was trained, which decides no answer.
_NOT_ANSWERING = ("base_model_name_or_path", "revision", "peft_version")


class Adapter:
    """A folder as PEFT saves it."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder, self.weights = folder, weights
        self.parameters = 0  # known once it is put on a model

    def identity(self) -> dict[str, str]:
        """Hash of weights and settings, and PEFT's version."""
        settings = {k: v for k, v in self._config().items() if k not in _NOT_ANSWERING}
        digest = combined_sha256([file_sha256(self.weights), json.dumps(settings, sort_keys=True)])
        return {"sha256": digest, "peft": importlib.metadata.version("peft")}

    def put_on(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with the adapter, not merged; the vocabulary stays as the checkpoint has it.

        Raises:
            UserError: if it does not fit the model; every missing or unexpected key is a failure.
        """
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights

        try:
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
        return module

    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.folder / CONFIG}: not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.folder / CONFIG}: expected an object, but got {config!r}.")
        return config


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
