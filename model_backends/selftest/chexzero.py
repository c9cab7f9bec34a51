"""CheXzero: embeddings as the original returns them, its pair probabilities, and its preprocessing."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from medvlm_harness.model_backends.chexzero import CheXzeroBackend, preprocess
from medvlm_harness.model_backends.image_vectors import unit
from medvlm_harness.requests import LabelSet

__all__ = ["FILES", "differences"]

CHECKPOINT, ANSWERS, PIXELS = "chexzero_tiny.pt", "chexzero_tiny_ref.safetensors", "chexzero_pre_ref.safetensors"
IMAGES = ("square", "tall", "wide")
FILES = (CHECKPOINT, ANSWERS, PIXELS, *(f"img_{name}.png" for name in IMAGES))


@torch.inference_mode()
def differences(folder: Path) -> dict[str, float]:
    """Largest absolute differences from the original code's answers."""
    backend = CheXzeroBackend(pretrained=str(folder / CHECKPOINT), device="cpu", precision="fp32", store="off")
    backend.ensure_loaded()
    answers, pixels = load_file(folder / ANSWERS), load_file(folder / PIXELS)
    with safe_open(folder / ANSWERS, "pt") as file:
        texts = file.metadata()["texts"].split("|")
    image = backend.image_features(answers["pixel_values"])
    # Labels and their denials by turns.
    pairs = zip(texts[::2], texts[1::2], strict=True)
    labels = LabelSet.from_config("golden", {yes: {"positive": [yes], "negative": [no]} for yes, no in pairs})
    _, probability = backend._score(unit(image.numpy()), labels)
    found = {
        "image embeddings": _largest(image, answers["image_embeds"]),
        "text embeddings": _largest(backend.text_features(answers["input_ids"]), answers["text_embeds"]),
        "pair probabilities": _largest(torch.from_numpy(probability), answers["prob"]),
    }
    for name in IMAGES:
        with Image.open(folder / f"img_{name}.png") as image_file:
            prepared = preprocess(image_file)  # at the published size, which the small checkpoint does not have
        found[f"pixels of {name}"] = _largest(prepared, pixels[name].expand_as(prepared))
    return found


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())
