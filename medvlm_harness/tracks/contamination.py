"""Whether a model was trained on what it is asked about, as far as its card says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from medvlm_harness.data.splits import SPLITS, canonical_split
from medvlm_harness.errors import UserError

__all__ = ["refuse_contaminated", "trained_splits"]


def trained_splits(
    trained_on: Iterable[str | Mapping[str, Any]], *, names: Iterable[str], split_scheme: str | None
) -> frozenset[str]:
    """The splits of a data set that a card's `trained_on` names.

    An entry is a data set's name ("IU-CXR"), a split of it ("R2Gen train split", "hash train split"), or
    `{dataset: iu_cxr, splits: [train]}`, which may say by what `scheme`. A name alone means all of it, unless another
    entry names its splits. Splits of another scheme than the prepared set's cut it elsewhere, so all of it then counts
    as seen.

    Args:
        trained_on: the entries of the card.
        names: what the data set is called, any case.
        split_scheme: the scheme that the prepared set uses, e.g. "r2gen".

    >>> sorted(trained_splits(["IU-CXR", "R2Gen train split"], names=["iu-cxr"], split_scheme="r2gen"))
    ['train']
    """
    known = {_plain(name) for name in names}
    whole = False
    named: set[str] = set()
    for entry in trained_on:
        if isinstance(entry, Mapping):
            if _plain(str(entry.get("dataset", ""))) in known:
                splits, scheme = entry.get("splits"), entry.get("scheme")
                if scheme is not None and _plain(str(scheme)) != _plain(split_scheme or ""):
                    splits = None
                named.update(map(canonical_split, map(str, splits)) if splits else SPLITS)
            continue
        words = entry.lower().split()
        if len(words) >= 2 and words[-1] == "split":
            scheme = _plain(" ".join(words[:-2]))
            if scheme == _plain(split_scheme or "") or scheme in known:
                named.add(canonical_split(words[-2]))
            elif scheme in {"r2gen", "hash"}:
                named.update(SPLITS)
        elif _plain(entry) in known:
            whole = True
    return frozenset(named or (SPLITS if whole else ()))


def refuse_contaminated(task: str, splits: Iterable[str], seen: frozenset[str], *, model: str, allowed: bool) -> None:
    """Refuse to score a model on a split that it was trained on.

    Raises:
        UserError: unless `allowed`.
    """
    both = [split for split in splits if split in seen]
    if both and not allowed:
        raise UserError(
            f"{task}: the card of {model} says that it was trained on the {' and '.join(both)} split of this data set. "
            "Choose another split, or see the numbers all the same with --metadata allow_contaminated=True "
            "(the result will say so)."
        )


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
