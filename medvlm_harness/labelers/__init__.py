"""From report text to the fourteen CheXpert observations, and to entities in RadGraph's form."""

from __future__ import annotations

from medvlm_harness.labelers.base import LABELERS, Labeler, labeler_from_text, make_labeler

__all__ = ["LABELERS", "Labeler", "labeler_from_text", "make_labeler"]
