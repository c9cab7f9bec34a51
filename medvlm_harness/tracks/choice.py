"""Multiple choice of the impression: which of four belongs to these findings?"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.bootstrap import bootstrap_means
from medvlm_harness.metrics.choice import choice_hits, frequency_scores, likeness_scores, same_words
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import Capability
from medvlm_harness.tracks.prompts import PromptedTask
from medvlm_harness.tracks.report_pairs import ReportPair, ReportPairs
from medvlm_harness.tracks.rows import Row

__all__ = ["ChoiceRow", "ImpressionChoice"]

Distractors = Literal["other_labels", "same_labels"]
OPTIONS = 4
PARTS = ("", "_abnormal")
SCORES = ("acc", "acc_norm")


@dataclass(frozen=True, slots=True)
class ChoiceRow(Row):
    """How likely a model found each option, in nats."""

    log_likelihoods: tuple[float, ...]

    __str__ = Row.__str__


class _Impression(NamedTuple):
    """One distinct impression of a split."""

    words: str
    text: str  # as its first study writes it
    labels: frozenset[str]  # positive or uncertain


class ImpressionChoice(ReportPairs, PromptedTask):
    """`loglikelihood` requests: the prompt, and each of four impressions after a blank; the likeliest is the answer.

    One is the study's own; three are those of other studies of the same split, no two of the same words. `distractors`
    says which (YAML): `other_labels`, no two of the four with the same labels, or `same_labels`, all four with the same
    ones: the labels that the rules labeler reads in the impression as positive or uncertain, `No Finding` among them.
    Studies for which there are no such three are left out and counted. Which three, and where the own one stands, is
    drawn by the study's id alone: neither --limit nor the number of processes changes it.

    Under --apply_chat_template there is no blank before an option, as in lm-eval's own multiple choice.

    YAML: as for `PromptedTask`, `dataset`, and `distractors` (other_labels by default).
    """

    OUTPUT_TYPE: ClassVar[str] = "loglikelihood"
    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"loglikelihood"})
    KEYS: ClassVar[frozenset[str]] = PromptedTask.KEYS | {"distractors"}

    def read_declaration(self) -> None:
        """Check the prompt and the kind of distractors."""
        super().read_declaration()
        self.distractors: Distractors = self.declared.get("distractors", "other_labels")
        if self.distractors not in get_args(Distractors):
            raise UserError(
                f"{self.task_name}: expected distractors to be one of {', '.join(get_args(Distractors))}, "
                f"but got {self.distractors!r}."
            )
        if "impression" in self.prompt_fields:
            raise UserError(f"{self.task_name}: expected a prompt without {{impression}}, which is what is asked for.")

    # --- documents

    @cached_property
    def _impressions(self) -> dict[str, _Impression]:
        """The distinct impressions of the split by their words, in the order of these; none without a word."""
        first: dict[str, str] = {}
        for pair in self.pairs:
            first.setdefault(same_words(pair.impression), pair.impression)
        return {key: _Impression(key, first[key], self._labels(first[key])) for key in sorted(first) if key}

    def _labels(self, impression: str) -> frozenset[str]:
        return frozenset(name for name, value in self.reader.labels(impression).items() if value in (1, -1))

    @cached_property
    def _options(self) -> dict[str, tuple[str, ...]]:
        """Of each study that has them: its own impression, then three others."""
        drawn = {pair.study.study_id: self._draw(pair) for pair in self.pairs}
        return {study_id: options for study_id, options in drawn.items() if len(options) == OPTIONS}

    def _draw(self, pair: ReportPair) -> tuple[str, ...]:
        own = self._impressions.get(same_words(pair.impression))
        if own is None:
            return ()
        options, seen = [pair.impression], {own.labels}
        pool = list(self._impressions.values())
        for place in _generator(pair.study.study_id, "distractors").permutation(len(pool)):
            other = pool[place]
            fits = other.labels == own.labels if self.distractors == "same_labels" else other.labels not in seen
            if fits and other.words != own.words:
                options.append(other.text)
                seen.add(other.labels)
            if len(options) == OPTIONS:
                break
        return tuple(options)

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study with three distractors.

        Raises:
            UserError: if the train split has nothing that floors could learn from: now, not when a model has answered.
        """
        if self._options:
            self.require_train_pairs()
        for pair in self.pairs:
            study_id = pair.study.study_id
            if study_id in self._options:
                own, *others = self._options[study_id]
                gold = int(_generator(study_id, "place").integers(OPTIONS))
                yield {
                    **self.document_ids(pair.study),
                    "prompt": self.prompt_for(pair.study),
                    "choices": [*others[:gold], own, *others[gold:]],
                    "target": gold,
                    "abnormal": self.is_abnormal(pair.study),
                }

    def what_studies_have(self) -> str:
        """What is lacking where no study has three distractors."""
        return f"{super().what_studies_have()}, never with {OPTIONS - 1} distractors of {self.distractors}"

    # --- requests

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """The prompt with each option."""
        context, before = self.as_chat(doc["prompt"]), "" if self.templated else " "
        return [
            Instance("loglikelihood", doc, (context, f"{before}{option}"), index, metadata=kwargs["metadata"])
            for index, option in enumerate(doc["choices"])
        ]

    def make_row(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> ChoiceRow:
        """The log-likelihoods of one study's options."""
        ids = doc["study_id"], doc["patient_id"], doc["split"]
        return ChoiceRow(*ids, "", tuple(float(value) for value, _ in results))

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Accuracy by log-likelihood, and by log-likelihood per byte, overall and on abnormal studies."""
        return tuple(f"{score}{part}" for part in PARTS for score in SCORES)

    @cached_property
    def _documents_by_study(self) -> dict[str, dict[str, Any]]:
        return {doc["study_id"]: doc for doc in self.documents}

    @cached_property
    def _floors(self) -> dict[str, dict[str, float]]:
        """Kind -> the chance of each study's right answer, by study id; learnt from the train split."""
        known, written = zip(*((findings, impression) for _, findings, impression in self.train_pairs), strict=True)
        findings = {pair.study.study_id: pair.findings for pair in self.pairs}
        options = [doc["choices"] for doc in self.documents]
        truth = [doc["target"] for doc in self.documents]
        scores = {
            "chance": np.zeros((len(options), OPTIONS)),
            "frequency": frequency_scores(written, options),
            "tfidf": likeness_scores([*known, *written], [findings[d["study_id"]] for d in self.documents], options),
        }
        ids = [doc["study_id"] for doc in self.documents]
        return {kind: dict(zip(ids, choice_hits(one, truth).tolist(), strict=True)) for kind, one in scores.items()}

    def estimate(self, rows: Sequence[ChoiceRow]) -> Mapping[str, Estimate]:
        """Accuracies beside the best of the floors."""
        estimates: dict[str, Estimate] = {}
        docs = [self._documents_by_study[row.study_id] for row in rows]
        for part in PARTS:
            chosen = [k for k, doc in enumerate(docs) if not part or doc["abnormal"]]
            if not chosen:
                nothing = Estimate.undefined("no abnormal study" if rows else "no study", n=0)
                estimates |= {f"{score}{part}": nothing for score in SCORES}
                continue
            ids = [rows[k].study_id for k in chosen]
            floors = {kind: float(np.mean([hits[one] for one in ids])) for kind, hits in self._floors.items()}
            hits = self._hits([rows[k] for k in chosen], [docs[k] for k in chosen])
            best = [max(floors.values())] * len(SCORES)
            found = bootstrap_means(hits, np.array(ids), floors=best, ceilings=[1.0] * len(SCORES))
            for score, one in zip(SCORES, found, strict=True):
                estimates[f"{score}{part}"] = replace(one, extra={**one.extra, "floors": floors})
        return {name: estimates[name] for name in self.metric_names()}

    def _hits(self, rows: Sequence[ChoiceRow], docs: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Probability of the right answer by each score, (n, 2)."""
        scores = np.array([row.log_likelihoods for row in rows])
        size = np.array([[len(option.encode()) for option in doc["choices"]] for doc in docs])
        truth = np.array([doc["target"] for doc in docs])
        return np.stack([choice_hits(scores, truth), choice_hits(scores / size, truth)], axis=1)

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds what read the labels, what was left out, and how many answers were no numbers."""
        labeler = self.reader.labeler
        return {
            **super().details(),
            "distractors": self.distractors,
            "abnormal_by": self.abnormal_by,
            "read_by": {"labeler": f"{labeler.name} {labeler.version}"},
            "counts": {
                "studies": len(self.documents),
                "abnormal_studies": sum(doc["abnormal"] for doc in self.documents),
                **self.left_out(),
                "studies_without_distractors": len(self.pairs) - len(self.documents),
                "answers_not_a_number": sum(math.isnan(value) for row in self.rows for value in row.log_likelihoods),
            },
            "right_places": dict(sorted(Counter(doc["target"] for doc in self.documents).items())),
        }

    def score_records(self, rows: Sequence[ChoiceRow]) -> Iterator[dict[str, Any]]:
        """One record per study and score."""
        if not rows:
            return
        hits = self._hits(rows, [self._documents_by_study[row.study_id] for row in rows])
        for row, values in zip(rows, hits.tolist(), strict=True):
            for score, value in zip(SCORES, values, strict=True):
                yield self.score_record(row, score, value=value)


def _generator(study_id: str, what: str) -> np.random.Generator:
    """Random numbers of one study, for one purpose."""
    digest = hashlib.sha256(f"{what}:{study_id}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
