"""Accuracy, not speed: what a text encoder's frozen vectors of findings hold, by linear probe and by search.

    python benchmarks/text_probe.py PRETRAINED

Probes learn CheXpert's observations on the training split and are scored on the test split, three seeds each; the
search looks for each test study's own impression by its findings, and back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import common
import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from medvlm_harness.data.chexpert import CHEXPERT_13
from medvlm_harness.data.labels import LABELER_SOURCE, resolve
from medvlm_harness.data.records import Study
from medvlm_harness.metrics.retrieval import chance, rank_queries, recall_at
from medvlm_harness.model_backends.text_encoder import TextEncoderBackend
from medvlm_harness.requests import TextRef
from medvlm_harness.training.linear_probe import linear_probe

ENOUGH = 10  # positives and negatives of the test split, as in the tracks' macro means


def measure(pretrained: str) -> dict[str, Any]:
    """AUROC of each label (mean, lowest and highest of the seeds), and recall of the search both ways."""
    backend = TextEncoderBackend(pretrained=pretrained)
    studies = [study for study in common.dataset().studies if study.findings.strip()]
    train, test = ([study for study in studies if study.split == split] for split in ("train", "test"))
    x, x_test = (_vectors(backend, [study.findings.strip() for study in side]) for side in (train, test))
    areas = {}
    for name in CHEXPERT_13:
        y, y_test = _labels(train, name), _labels(test, name)
        known = ~np.isnan(y_test)
        if min((y_test[known] == 1).sum(), (y_test[known] == 0).sum()) < ENOUGH:
            continue
        probe = linear_probe(x, y, _patients(train), x_test, _patients(test))
        found = [float(roc_auc_score(y_test[known], row[known])) for row in probe.margin]
        areas[name] = {"mean": np.mean(found), "seeds": [min(found), max(found)], "positives": int(y_test[known].sum())}
    both = [study for study in test if study.impression.strip()]
    findings = _vectors(backend, [study.findings.strip() for study in both])
    impressions = _vectors(backend, [study.impression.strip() for study in both])
    own = np.arange(len(both))
    return {
        "train": len(train),
        "test": len(test),
        "auroc": areas,
        "auroc_mean": float(np.mean([area["mean"] for area in areas.values()])),
        "recall": {
            f"{name}@{k}": float(recall_at(rank_queries(a, b, own, own), k).mean())
            for name, a, b in (("findings to impression", findings, impressions), ("back", impressions, findings))
            for k in (1, 5, 10)
        },
        "chance@10": float(recall_at(chance(own, own), 10).mean()),
    }


def _vectors(backend: TextEncoderBackend, texts: Sequence[str]) -> NDArray[np.float32]:
    answers = backend.embed([Instance("embed", {}, (TextRef(text),), k) for k, text in enumerate(texts)])
    return np.stack([answer.vector for answer in answers])


def _labels(studies: Sequence[Study], name: str) -> NDArray[np.float64]:
    """1 or 0; NaN where the labeler was uncertain."""
    values = [resolve(study.labels[LABELER_SOURCE], name) for study in studies]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _patients(studies: Sequence[Study]) -> list[str]:
    return [study.patient_id for study in studies]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1]), indent=2))
