"""The medical terms that this package knows, by table: what vocabularies are asked to keep whole."""

from __future__ import annotations

from medvlm_harness.labelers.lexicon import lexicon
from medvlm_harness.labelers.rules import MENTION_TERMS
from medvlm_harness.labelers.term_files import load_terms, strings
from medvlm_harness.metrics.mesh import mesh_headings

__all__ = ["term_tables"]

# Table -> the lists of entities.yaml in it.
_ENTITIES = {
    "anatomy": ("organs", "parts", "places"),
    "findings": ("findings",),
    "devices": ("devices",),
    "descriptors": ("normality", "descriptors"),
}


def term_tables() -> dict[str, tuple[str, ...]]:
    """Table -> its distinct terms in lower case.

    `chexpert` are the labeler's phrases for the fourteen observations, `mesh` the headings that Open-i's coders use,
    the others the words of the entity extractor.
    """
    labels = load_terms(MENTION_TERMS, {"labels", "other"})["labels"].values()
    phrases = [
        phrase
        for label in labels
        for kind in ("findings", "uncertain", "structures")
        for phrase in strings(MENTION_TERMS, label[kind])
    ]
    words = lexicon().words.values()
    entities = {table: [word.base for word in words if word.group in groups] for table, groups in _ENTITIES.items()}
    return {name: tuple(dict.fromkeys(terms)) for name, terms in
            {"chexpert": phrases, "mesh": mesh_headings(), **entities}.items()}  # fmt: skip
