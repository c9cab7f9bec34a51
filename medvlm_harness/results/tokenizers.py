"""Tokenizers measured on reports: the numbers of each, and the first one's less each other's, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medvlm_harness.metrics.tokenization import (
    LIMITS,
    TermCuts,
    metric_names,
    term_list_cuts,
    tokenization,
    tokenization_estimates,
)
from medvlm_harness.model_backends.tokenizer_files import ReportTokenizer

__all__ = ["MOST_CUT", "measure_tokenizers"]

MOST_CUT = 10  # terms that are named
REMOVED = "XXXX"


def measure_tokenizers(
    tokenizers: Mapping[str, ReportTokenizer],
    texts: Sequence[str],
    study_ids: Sequence[str],
    tables: Mapping[str, Sequence[str]],
    *,
    notes: Mapping[str, Sequence[str]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every tokenizer on the same reports.

    Args:
        tokenizers: name for people -> tokenizer; differences are the first one's less each other's.
        texts: the reports, none empty.
        study_ids: of the reports.
        tables: table -> medical terms.
        notes: name -> what a reader must know of it.
        resamples: of the bootstrap over studies.
        seed: of the bootstrap.
    """
    counts, described = {}, {}
    for name, tokenizer in tokenizers.items():
        counts[name] = tokenization(
            tokenizer.encode(texts), tables, special=tokenizer.special, knows_bytes=tokenizer.knows_bytes
        )
        own = ["byte-level: no text is unknown"] if tokenizer.knows_bytes else []
        removed, tokens = counts[name].removed_pieces.sum(), counts[name].tokens.sum()
        described[name] = {
            "vocabulary": tokenizer.vocabulary,
            "special_tokens": tokenizer.special,
            "byte_level": tokenizer.knows_bytes,
            "sha256": tokenizer.sha256,
            "notes": [*own, *(notes or {}).get(name, ())],
            "removed": {
                "pieces": tokenizer.pieces(f"the {REMOVED}")[len(tokenizer.pieces("the")) :],
                "occurrences": int(counts[name].removed.sum()),
                "share": float(removed / tokens) if tokens else None,
            },
            "term_lists": {table: _of_list(tokenizer, terms) for table, terms in tables.items()},
            "most_cut": _most_cut(tokenizer, tables, counts[name].terms),
        }
    estimates = tokenization_estimates(counts, study_ids, resamples=resamples, seed=seed)
    metrics, (first, *_) = metric_names(list(tables)), tokenizers
    return {
        "limits": list(LIMITS),
        "term_tables": {table: len(terms) for table, terms in tables.items()},
        "tokenizers": {
            name: {
                **described[name],
                "metrics": {metric: estimates[f"{metric}_{name}"].to_dict() for metric in metrics},
                "first_minus_this": {
                    metric: estimates[f"{metric}_{first}_minus_{name}"].to_dict() for metric in metrics
                }
                if name != first
                else {},
            }
            for name in tokenizers
        },
    }


def _of_list(tokenizer: ReportTokenizer, terms: Sequence[str]) -> dict[str, Any]:
    cuts = term_list_cuts(tokenizer.encode([f"the {term}" for term in terms]))
    pieces, words = int(cuts.pieces.sum()), int(cuts.words.sum())
    return {
        "terms": len(terms),
        "whole": int(cuts.whole.sum()) / len(terms),
        "pieces_per_term": pieces / len(terms),
        "words_per_term": words / len(terms),
    }


def _most_cut(
    tokenizer: ReportTokenizer, tables: Mapping[str, Sequence[str]], found: Mapping[str, TermCuts]
) -> list[dict[str, Any]]:
    """The terms that cost most pieces beyond one per word in the reports, whichever table they stand in."""
    cost: dict[str, tuple[int, int, float]] = {}
    for table, terms in tables.items():
        cuts = found[table]
        for place, term in enumerate(terms):
            if cuts.occurrences[place]:
                beyond, times = int(cuts.pieces[place] - cuts.words[place]), int(cuts.occurrences[place])
                cost[term] = (beyond, times, float(cuts.pieces[place] / times))
    order = sorted((term for term in cost if cost[term][0] > 0), key=lambda term: (-cost[term][0], term))
    before = len(tokenizer.pieces("the"))
    return [
        {
            "term": term,
            "occurrences": cost[term][1],
            "pieces": cost[term][2],
            "as": tokenizer.pieces(f"the {term}")[before:],
        }
        for term in order[:MOST_CUT]
    ]
