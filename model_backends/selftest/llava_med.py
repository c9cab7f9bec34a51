"""Self-test of `llava-med`: both vision towers, the preprocessing, and the prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from medvlm_harness.model_backends.llava_med import LlavaMedBackend, Tower, preprocess

__all__ = ["FILES", "TOLERANCES", "differences"]

CHECKPOINT, TOWER, REFERENCE = "llavamed15_tiny", "tiny_clip", "llavamed15_tiny_ref.pt"
PIXELS, PROMPT = "llavamed15_pre_ref.safetensors", "llavamed15_prompt.txt"
SHAPES = ("square", "tall", "wide")
FILES = (CHECKPOINT, TOWER, REFERENCE, PIXELS, PROMPT, *(f"img_{shape}.png" for shape in SHAPES))
TOLERANCES = {"preprocessing": 2e-3}  # kept in float16
QUESTION = "What is seen?"  # of the stored prompt


def differences(folder: Path) -> dict[str, float]:
    """What is compared -> the largest absolute difference; of tokens and texts 0 if they are the same, else 1."""
    reference = torch.load(folder / REFERENCE, weights_only=True)
    ids, pixels = reference["ids"], reference["px"]

    def backend(tower: Tower) -> LlavaMedBackend:
        where = {"pretrained": str(folder / CHECKPOINT), "stock_tower": str(folder / TOWER)}
        return LlavaMedBackend(tower=tower, **where, device="cpu", precision="fp32", store="off")

    own, stock = backend("checkpoint"), backend("stock")
    _, *written = reference["gen"][0].tolist()  # the original gives the begin token first
    shown = {shape: preprocess(Image.open(folder / f"img_{shape}.png")) for shape in SHAPES}
    stored = load_file(folder / PIXELS)
    return {
        "logits": _largest(own.logits(ids, pixels), reference["logits"]),
        "logits with the stock tower": _largest(stock.logits(ids, pixels), reference["logits_official"]),
        "projected features": _largest(own.projected(pixels), reference["feats"]),
        "greedy tokens": float(own.greedy(ids[:1], pixels[:1], len(written)).tolist() != [written]),
        "preprocessing": max(_largest(shown[shape], stored[shape][0].float()) for shape in SHAPES),
        "prompt": float(own.prompt_text(QUESTION, images=1) != (folder / PROMPT).read_text(encoding="utf-8")),
    }


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())
