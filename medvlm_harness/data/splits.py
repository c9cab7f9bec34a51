"""Train, validation and test: which patient belongs where, and how a user names them."""

from __future__ import annotations

import csv
import hashlib
from functools import cache
from importlib.resources import files
from typing import Literal

from medvlm_harness.errors import UserError, near_matches

__all__ = ["SPLITS", "SPLIT_SCHEMES", "SplitScheme", "assign_split", "canonical_split", "parse_splits"]

SPLITS = ("train", "validation", "test", "unassigned")
SplitScheme = Literal["r2gen", "hash"]
SPLIT_SCHEMES: tuple[SplitScheme, ...] = ("r2gen", "hash")
HASH_SHARES = (("train", 0.7), ("validation", 0.8), ("test", 1.0))  # cumulative
_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


def canonical_split(name: str) -> str:
    """Our name of a split, from any usual spelling.

    Raises:
        UserError: if there is no such split.

    >>> canonical_split("Val")
    'validation'
    """
    key = name.strip().lower()
    key = _ALIASES.get(key, key)
    if key not in SPLITS:
        raise UserError(f"Expected a split, but got {name!r}.{near_matches(key, (*SPLITS, 'all'))}")
    return key


def parse_splits(text: str) -> tuple[str, ...]:
    """The splits a user asked for, in canonical order.

    >>> parse_splits("test+val")
    ('validation', 'test')
    """
    if text.strip().lower() == "all":
        return SPLITS
    asked = {canonical_split(part) for part in text.split("+")}
    return tuple(split for split in SPLITS if split in asked)


def assign_split(patient_id: str, scheme: SplitScheme) -> str:
    """The split of one patient, so that no patient is ever on two sides.

    Args:
        patient_id: for IU-CXR the uid.
        scheme: "r2gen" for the published split of IU-CXR (patients outside it are "unassigned"), "hash" for 70/10/20
            by the SHA-256 of the id, which needs no table and never changes when patients are added.

    Source: Chen et al. 2020, arXiv 2010.16056 (R2Gen).
    """
    if scheme == "r2gen":
        return _r2gen().get(patient_id, "unassigned")
    if scheme == "hash":
        share = int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:8], "big") / 2**64
        return next(split for split, limit in HASH_SHARES if share < limit or limit == 1.0)
    raise UserError(f"Expected a split scheme, but got {scheme!r}.{near_matches(scheme, SPLIT_SCHEMES)}")


@cache
def _r2gen() -> dict[str, str]:
    with files("medvlm_harness.data").joinpath("r2gen_split.csv").open(encoding="utf-8") as table:
        return {row["uid"]: row["split"] for row in csv.DictReader(table)}
