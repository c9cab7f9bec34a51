"""MedCLIP with a Swin tower against its own code: both towers, logits, preprocessing."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from medvlm_harness.model_backends.medclip import MedClipBackend, preprocess

__all__ = ["FILES", "differences"]

CHECKPOINT, REFERENCE, PIXELS = (
    "medclip_tiny_pytorch_model.bin",
    "medclip_tiny_ref.safetensors",
    "medclip_pre_ref.safetensors",
)
SHAPES = ("square", "tall", "wide")
FILES = (CHECKPOINT, REFERENCE, PIXELS, *(f"img_{shape}.png" for shape in SHAPES))


def differences(folder: Path) -> dict[str, float]:
    """What is compared, and the largest absolute difference to the original code's answer."""
    reference, pixels = load_file(folder / REFERENCE), load_file(folder / PIXELS)
    backend = MedClipBackend(pretrained=str(folder / CHECKPOINT), device="cpu", precision="fp32", store="off")
    image = torch.nn.functional.normalize(backend.image_features(reference["pixel_values"]), dim=-1)
    text = torch.nn.functional.normalize(
        backend.text_features(reference["input_ids"], reference["attention_mask"]), dim=-1
    )
    ours = {
        "image_embeds": image,
        "text_embeds": text,
        "logits_per_image": backend.logit_scale * image @ text.T,
    }
    found = {name: _largest(value, reference[name]) for name, value in ours.items()}
    for shape in SHAPES:
        with Image.open(folder / f"img_{shape}.png") as opened:
            found[f"pixels of a {shape} image"] = _largest(preprocess(opened)[None], pixels[shape])
    return found


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())
