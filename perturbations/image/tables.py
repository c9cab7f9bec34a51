"""The declarations: which corruptions a modality has, at which levels, and the suites.

Levels named MedMNIST-C are the numbers of `corruptions/registry.py` in medmnistc 0.1.0 (PyPI, Apache-2.0; Di Salvo et
al., arXiv 2406.17536), the first five where it lists six. The others are ours, from barely visible to what a reader
would send back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.perturbations.image import blur, geometry, intensity, mri, noise
from medvlm_harness.perturbations.image.base import Apply, Case, Corruption, Level

__all__ = ["CORRUPTIONS", "MODALITIES", "SUITES", "corruptions_of", "find_corruption", "find_suite"]

_PUBLISHED: Mapping[str, Apply] = {
    "pixelate": blur.pixelate,
    "jpeg_compression": blur.compress_jpeg,
    "gaussian_noise": noise.add_gaussian_noise,
    "speckle_noise": noise.add_speckle_noise,
    "impulse_noise": noise.add_impulse_noise,
    "shot_noise": noise.add_shot_noise,
    "gaussian_blur": blur.blur_gaussian,
    "defocus_blur": blur.blur_defocus,
    "motion_blur": blur.blur_motion,
    "brightness_up": intensity.change_brightness,
    "brightness_down": intensity.change_brightness,
    "contrast_up": intensity.change_contrast,
    "contrast_down": intensity.change_contrast,
    "gamma_corr_up": intensity.change_gamma,
    "gamma_corr_down": intensity.change_gamma,
}

_CHEST: dict[str, tuple[Level, ...]] = {
    "pixelate": (0.30, 0.25, 0.20, 0.15, 0.10),
    "jpeg_compression": (50, 30, 15, 10, 7),
    "gaussian_noise": (0.04, 0.08, 0.12, 0.18, 0.26),
    "speckle_noise": (0.05, 0.15, 0.2, 0.35, 0.45),
    "impulse_noise": (0.01, 0.03, 0.06, 0.09, 0.17),
    "shot_noise": (60, 25, 18, 10, 5),
    "gaussian_blur": (3, 5, 7, 9, 11),
    "brightness_up": (1.1, 1.2, 1.3, 1.4, 1.5),
    "brightness_down": (0.9, 0.8, 0.7, 0.6, 0.5),
    "contrast_up": (1.1, 1.2, 1.3, 1.4, 1.6),
    "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.4),
    "gamma_corr_up": (1.1, 1.2, 1.3, 1.4, 1.6),
    "gamma_corr_down": (0.9, 0.8, 0.7, 0.6, 0.4),
}
_CT: dict[str, tuple[Level, ...]] = {
    "pixelate": (0.7, 0.6, 0.5, 0.40, 0.35),
    "jpeg_compression": (50, 30, 15, 10, 7),
    "gaussian_noise": (0.04, 0.08, 0.12, 0.16, 0.20),
    "speckle_noise": (0.05, 0.10, 0.20, 0.30, 0.40),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.08),
    "shot_noise": (200, 100, 50, 25, 15),
    "gaussian_blur": (11, 13, 15, 17, 21),
    "brightness_up": (1.2, 1.3, 1.4, 1.5, 1.6),
    "brightness_down": (0.8, 0.75, 0.7, 0.65, 0.60),
    "contrast_up": (1.3, 1.4, 1.6, 1.7, 1.8),
    "contrast_down": (0.8, 0.7, 0.6, 0.55, 0.5),
    "gamma_corr_up": (1.3, 1.4, 1.6, 1.8, 2.0),
    "gamma_corr_down": (0.9, 0.8, 0.7, 0.6, 0.4),
}
_FUNDUS: dict[str, tuple[Level, ...]] = {
    "pixelate": (0.8, 0.60, 0.50, 0.40, 0.35),
    "jpeg_compression": (30, 25, 20, 10, 5),
    "gaussian_noise": (0.04, 0.08, 0.12, 0.16, 0.20),
    "speckle_noise": (0.10, 0.15, 0.20, 0.25, 0.30),
    "defocus_blur": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
    "motion_blur": ((8, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
    "brightness_down": (0.9, 0.8, 0.7, 0.6, 0.5),
    "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.4),
}
_OCT: dict[str, tuple[Level, ...]] = {
    "pixelate": (0.30, 0.25, 0.20, 0.15, 0.10),
    "jpeg_compression": (30, 15, 10, 7, 5),
    "speckle_noise": (0.15, 0.30, 0.40, 0.50, 0.60),
    "defocus_blur": ((0.5, 0.6), (1, 0.5), (1.5, 0.1), (2.0, 0.5), (2.5, 0.1)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "contrast_down": (0.6, 0.4, 0.3, 0.2, 0.15),
}


def _published(modality: str, data_set: str, levels: Mapping[str, tuple[Level, ...]]) -> Iterable[Corruption]:
    source = f"MedMNIST-C, {data_set}"
    return (Corruption(name, modality, row, _PUBLISHED[name], source) for name, row in levels.items())


OURS = "this package"
_OWN = (
    Corruption("tilt", "chest", (0.03, 0.06, 0.09, 0.12, 0.15), geometry.tilt, OURS),
    Corruption("rotation", "chest", (2, 4, 6, 8, 10), geometry.rotate, OURS),
    Corruption("inversion", "chest", (1,), intensity.invert, OURS),
    Corruption(
        "window_level",
        "chest",
        ((0.03, 0.9), (0.06, 0.8), (0.09, 0.7), (0.12, 0.6), (0.15, 0.5)),
        intensity.change_window,
        OURS,
    ),
    Corruption("crop", "chest", (0.02, 0.04, 0.07, 0.10, 0.15), geometry.crop, OURS),
    Corruption("border", "chest", (0.02, 0.04, 0.07, 0.10, 0.15), geometry.add_border, OURS),
    Corruption(
        "burned_in_marker",
        "chest",
        (("side", 0.06), ("side", 0.10), ("PORTABLE", 0.06), ("PORTABLE", 0.09), ("PORTABLE", 0.13)),
        geometry.burn_marker,
        OURS,
    ),
    # An image-text model should not keep "left" and "right" here: a control of laterality, in no robustness suite.
    Corruption("left_right_flip", "chest", (1,), geometry.flip, OURS, control=True),
    Corruption("gibbs_ringing", "mri", (0.4, 0.5, 0.6, 0.7, 0.8), mri.ring_gibbs, OURS, extra="mri"),
    Corruption("rician_noise", "mri", (0.03, 0.06, 0.10, 0.15, 0.22), mri.add_rician_noise, OURS, extra="mri"),
    Corruption("bias_field", "mri", (0.1, 0.2, 0.3, 0.4, 0.5), mri.add_bias_field, OURS, extra="mri"),
)

CORRUPTIONS: tuple[Corruption, ...] = (
    *_published("chest", "chestmnist", _CHEST),
    *(corruption for corruption in _OWN if corruption.modality == "chest"),
    *_published("ct", "organ{a,c,s}mnist", _CT),
    *_published("fundus", "retinamnist", _FUNDUS),
    *_published("oct", "octmnist", _OCT),
    *(corruption for corruption in _OWN if corruption.modality == "mri"),
)
MODALITIES: tuple[str, ...] = tuple(dict.fromkeys(corruption.modality for corruption in CORRUPTIONS))

QUICK_SEVERITIES = (1, 3, 5)
# One of each family that the modality has: noise, blur, coding, grey values, and position or resolution.
_QUICK: Mapping[str, tuple[str, ...]] = {
    "chest": ("gaussian_noise", "gaussian_blur", "jpeg_compression", "contrast_down", "rotation"),
    "ct": ("gaussian_noise", "gaussian_blur", "jpeg_compression", "contrast_down", "pixelate"),
    "fundus": ("gaussian_noise", "defocus_blur", "jpeg_compression", "contrast_down", "pixelate"),
    "oct": ("speckle_noise", "defocus_blur", "jpeg_compression", "contrast_down", "pixelate"),
    "mri": ("gibbs_ringing", "rician_noise", "bias_field"),  # all that there are
}
SUITES = ("quick", "full")


def corruptions_of(modality: str) -> tuple[Corruption, ...]:
    """All corruptions of a modality, controls as well, in the order of their declaration.

    Raises:
        UserError: if the modality is unknown.
    """
    if modality not in MODALITIES:
        raise UserError(f"Unknown modality {modality!r}.{near_matches(modality, MODALITIES)}")
    return tuple(corruption for corruption in CORRUPTIONS if corruption.modality == modality)


def find_corruption(name: str, modality: str) -> Corruption:
    """The corruption of this name for this modality.

    Raises:
        UserError: if the modality is unknown, or has no such corruption: then with near matches, or where it exists.
    """
    of_modality = {corruption.name: corruption for corruption in corruptions_of(modality)}
    if name in of_modality:
        return of_modality[name]
    elsewhere = [corruption.modality for corruption in CORRUPTIONS if corruption.name == name]
    if elsewhere:
        known = ", ".join(of_modality)
        raise UserError(
            f"Corruption {name} is declared for {', '.join(elsewhere)}, not for {modality}, which has {known}."
        )
    raise UserError(f"Unknown corruption {name!r} of modality {modality}.{near_matches(name, of_modality)}")


def find_suite(name: str, modality: str, *, seed: int = 0) -> tuple[Case, ...]:
    """The cases of a suite: `quick` (5 corruptions, severities 1, 3, 5) or `full` (all but controls, every severity).

    Raises:
        UserError: if the suite or the modality is unknown.
    """
    corruptions = corruptions_of(modality)
    if name not in SUITES:
        raise UserError(f"Unknown suite {name!r} of image corruptions.{near_matches(name, SUITES)}")
    if name == "quick":
        chosen = [find_corruption(entry, modality) for entry in _QUICK[modality]]
        return tuple(Case(corruption, severity, seed) for corruption in chosen for severity in QUICK_SEVERITIES)
    return tuple(Case(item, severity, seed) for item in corruptions if not item.control for severity in item.severities)
