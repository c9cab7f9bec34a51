"""Image corruptions: declared in `tables`, applied by `corrupt`."""

from medvlm_harness.perturbations.image.base import Case, Corruption, corrupt, identity
from medvlm_harness.perturbations.image.tables import (
    CORRUPTIONS,
    MODALITIES,
    SUITES,
    corruptions_of,
    find_corruption,
    find_suite,
)

__all__ = [
    "CORRUPTIONS",
    "MODALITIES",
    "SUITES",
    "Case",
    "Corruption",
    "corrupt",
    "corruptions_of",
    "find_corruption",
    "find_suite",
    "identity",
]
