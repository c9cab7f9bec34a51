"""`medvlm convert`, from the command line; what it does is tested beside the backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def test_a_checkpoint_becomes_safetensors_and_the_rest_is_told(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    torch.save({"network": {"a": tensor, "b": tensor}, "it": 5}, tmp_path / "model.pt")
    status, out, err = medvlm("convert", "model.pt", "-o", "model.safetensors", "--key", "network")
    assert (status, err) == (0, "")
    assert "left out: it (int)" in out
    assert "copied: b shared memory with another tensor" in out
    assert "wrote 2 tensors to model.safetensors, and read them back" in out
    assert load_file(tmp_path / "model.safetensors").keys() == {"a", "b"}
    again = medvlm("convert", "model.pt", "-o", "model.safetensors", "--key", "network")
    assert (again.status, again.error) == (2, "model.safetensors exists already, and is not overwritten.")


def test_code_is_run_only_when_asked(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    refused = medvlm("convert", "whole.pt", "-o", "whole.safetensors")
    assert refused.status == 2
    assert "Linear" in refused.error and "--trust-pickle" in refused.error
    assert not (tmp_path / "whole.safetensors").exists()
    assert medvlm("convert", "whole.pt", "-o", "whole.safetensors", "--trust-pickle").status == 0
    assert load_file(tmp_path / "whole.safetensors").keys() == {"weight", "bias"}
