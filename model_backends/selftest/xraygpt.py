"""Self-test of `xraygpt`: each stage of an image, the logits, and greedy decoding."""

from __future__ import annotations

from pathlib import Path

import torch

from medvlm_harness.model_backends.interleaved import IMAGE_MARK
from medvlm_harness.model_backends.xraygpt import XrayGptBackend

__all__ = ["FILES", "differences"]

CHECKPOINT, REFERENCE = "xraygpt_tiny.pth", "xraygpt_tiny_ref.pt"
FILES = (CHECKPOINT, "xraygpt_tiny_config.json", REFERENCE)


def differences(folder: Path) -> dict[str, float]:
    """What is compared -> the largest absolute difference; of tokens 0 if they are the same, else 1."""
    reference = torch.load(folder / REFERENCE, weights_only=True)
    backend = XrayGptBackend(pretrained=str(folder / CHECKPOINT), device="cpu", precision="fp32", store="off")
    pixels = reference["px"]
    places = torch.full((len(pixels), 1), IMAGE_MARK)
    ids = torch.cat([reference["ids0"], places, reference["ids1"]], dim=1)
    stages = backend.image_stages(pixels)
    _, *written = reference["gen"][0].tolist()  # the original gives the begin token first
    return {
        "vision tower": _largest(stages.vision, reference["ie"]),
        "q-former": _largest(stages.queries, reference["qo"]),
        "projected features": _largest(stages.projected, reference["x"]),
        "logits": _largest(backend.logits(ids, pixels), reference["lg"]),
        "greedy tokens": float(backend.greedy(ids[:1], pixels[:1], len(written)).tolist() != [written]),
    }


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())
