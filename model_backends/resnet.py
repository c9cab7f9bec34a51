"""torchvision's bottleneck ResNets, built from the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from medvlm_harness.model_backends.open_clip_towers import load_exactly
from medvlm_harness.model_backends.towers import refuse_key_mismatch
from medvlm_harness.model_backends.transformers_towers import numbered

__all__ = ["is_resnet", "resnet"]


def is_resnet(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the names are those of torchvision's ResNets."""
    return "conv1.weight" in state or "layer1.0.conv1.weight" in state


def resnet(state: Mapping[str, torch.Tensor], where: str, *, bias: bool) -> torch.nn.Module:
    """A ResNet with as many blocks as the weights have, and a last layer as wide as theirs.

    Args:
        state: its weights.
        where: the file, for errors.
        bias: whether the last layer has one.

    Raises:
        UserError: if a key is missing or unexpected, or a shape differs.
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    refuse_key_mismatch(where, "a ResNet", [name for name in ("fc.weight",) if name not in state], [])
    model: torch.nn.Module = ResNet(Bottleneck, [len(numbered(state, f"layer{k}.")) for k in range(1, 5)])
    out, features = state["fc.weight"].shape
    model.fc = torch.nn.Linear(features, out, bias=bias)
    load_exactly(model, dict(state), where, "a ResNet of torchvision")
    return model
