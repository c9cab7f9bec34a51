"""Artefacts of magnetic resonance, by MONAI (the extra `mri`), at the image's own size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medvlm_harness.perturbations.image.base import to_image, to_unit

__all__ = ["add_bias_field", "add_rician_noise", "ring_gibbs"]


def ring_gibbs(image: Image.Image, alpha: float, rng: np.random.Generator) -> Image.Image:
    """Ringing: k-space cut to a sphere, from 0 (whole) to 1 (nothing left)."""
    from monai.transforms import GibbsNoise

    return _channels_last(GibbsNoise(alpha=alpha)(_channels_first(image)))


def add_rician_noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Magnitude of a signal with Gaussian noise of this sigma in both of its parts."""
    from monai.transforms import RandRicianNoise

    transform = RandRicianNoise(prob=1.0, mean=0.0, std=sigma, sample_std=False)
    transform.set_random_state(seed=int(rng.integers(2**32)))
    return _channels_last(transform(_channels_first(image)))


def add_bias_field(image: Image.Image, coefficient: float, rng: np.random.Generator) -> Image.Image:
    """Uneven coil sensitivity: times exp of a cubic polynomial whose coefficients are drawn up to this one."""
    from monai.transforms import RandBiasField

    transform = RandBiasField(degree=3, coeff_range=(-coefficient, coefficient), prob=1.0)
    transform.set_random_state(seed=int(rng.integers(2**32)))
    return _channels_last(transform(_channels_first(image)))


def _channels_first(image: Image.Image) -> NDArray[np.float32]:
    values = to_unit(image)
    return values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)


def _channels_last(values: object) -> Image.Image:
    array = np.asarray(values, dtype=np.float32)
    return to_image(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1))
