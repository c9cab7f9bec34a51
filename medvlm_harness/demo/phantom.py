"""Procedural chest phantoms: analytic shapes that read as a chest film, so that the package runs with no data at all.

Nothing here stems from a patient, and nothing measured on it says anything about medicine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from medvlm_harness.demo.anatomy import Anatomy, Array, Finding, View, draw_chest, sample_anatomy, smooth_noise
from medvlm_harness.demo.pathology import alter_anatomy, draw_finding

__all__ = ["Anatomy", "Finding", "View", "render", "sample_anatomy"]


def render(
    findings: Sequence[Finding], view: View, rng: np.random.Generator, anatomy: Anatomy | None = None
) -> NDArray[np.uint8]:
    """Draw one image.

    The same generator state gives the same body, pose and noise whatever the findings are, so that two pictures differ
    by the findings only.

    Returns:
        Grey values, shape (160, 160); bone is white.
    """
    body_rng, pose_rng, texture_rng, finding_rng = rng.spawn(4)
    anatomy = alter_anatomy(anatomy or sample_anatomy(body_rng), findings)
    chest = draw_chest(anatomy, view, pose_rng, texture_rng)
    for finding, own_rng in zip(findings, finding_rng.spawn(len(findings)), strict=True):
        chest = replace(chest, density=draw_finding(chest, finding, own_rng))
    return _expose(chest.density, pose_rng, texture_rng)


def _expose(density: Array, pose_rng: np.random.Generator, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Film: uneven exposure, blur, contrast and quantum noise, to 8 bits."""
    blur, gamma, gain, offset = pose_rng.uniform((0.5, 0.85, 0.92, -0.03), (0.9, 1.25, 1.10, 0.04)).tolist()
    field = density + 0.018 * smooth_noise(rng, 9) + 0.018 * smooth_noise(rng, 28)
    picture = Image.fromarray(np.clip(field, 0, 1.2).astype(np.float32) * 200).convert("L")
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32) / 200
    noise = rng.uniform(0.015, 0.035) * rng.standard_normal(soft.shape, dtype=np.float32)
    film = gain * np.clip(soft, 0, None) ** gamma + offset + noise
    pixels: NDArray[np.uint8] = np.clip(film * 255, 0, 255).astype(np.uint8)
    return pixels
