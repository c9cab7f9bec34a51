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
from scipy.special import softmax

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.bootstrap import bootstrap_means
from medvlm_harness.metrics.choice import choice_hits, frequency_scores, likeness_scores, same_words
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import Capability, TextRef, capabilities_of
from medvlm_harness.tracks.option_trust import OPTION_CALIBRATION, option_calibration
from medvlm_harness.tracks.prompts import PromptedTask
from medvlm_harness.tracks.report_pairs import ReportPair, ReportPairs
from medvlm_harness.tracks.rows import Row

__all__ = ["ChoiceRow", "ImpressionChoice"]

Distractors = Literal["other_labels", "same_labels"]
AnsweredBy = Literal["likelihood", "similarity"]
OPTIONS = 4
SIMILARITY_NEEDS: frozenset[Capability] = frozenset({"embed:text"})
PARTS = ("", "_abnormal")
SCORES = ("acc", "acc_norm")


@dataclass(frozen=True, slots=True)
class ChoiceRow(Row):
    """How likely a model found each option, in nats; or its cosine with the findings."""

    option_scores: tuple[float, ...]

    __str__ = Row.__str__


class _Impression(NamedTuple):
    """One distinct impression of a split."""

    words: str
    text: str  # as its first study writes it
    labels: frozenset[str]  # positive or uncertain


class ImpressionChoice(ReportPairs, PromptedTask):
    """Which of four impressions belongs to these findings? By likelihood, or by similarity where a model has no other.

    `loglikelihood` requests: the prompt, and each impression after a blank; the likeliest is the answer. Of a model
    that cannot say how likely a text is, but has vectors of texts (a dual encoder, a text encoder without a trained
    head), `embed` requests: the sections of the report that the prompt holds, and each impression; the answer is the
    one of the highest cosine. `answered_by` in the details says which, for the two are not the same question.

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
        self.answered_by: AnsweredBy = "likelihood"
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

    def needs(self, lm: Any) -> frozenset[Capability]:
        """Likelihoods, else vectors of texts."""
        known = capabilities_of(lm)
        by_vectors = known is not None and not known >= self.NEEDS and known >= SIMILARITY_NEEDS
        return SIMILARITY_NEEDS if by_vectors else self.NEEDS

    def refuses(self, lm: Any) -> str | None:
        """Other words of a prompt change nothing where it is not read."""
        if self.needs(lm) == SIMILARITY_NEEDS and self.perturbation.prompt is not None:
            return "this model compares vectors of texts and reads no prompt, whose words were to be changed"
        return super().refuses(lm)

    def prepare_for(self, lm: Any) -> None:
        """Settle how it is asked."""
        super().prepare_for(lm)
        if self.needs(lm) == SIMILARITY_NEEDS:
            self.answered_by = "similarity"
            # By this lm-eval pads the requests of processes that have fewer.
            setattr(self, "OUTPUT_TYPE", "embed")  # noqa: B010  # a class attribute elsewhere

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """The prompt with each option; or the findings, then each option."""
        if self.answered_by == "similarity":
            study = self.as_asked(self.by_id[doc["study_id"]])
            asked = " ".join(self.prompt_field(study, name) for name in self.input_sections())
            return [
                Instance("embed", doc, (TextRef(text),), index, metadata=kwargs["metadata"])
                for index, text in enumerate((asked, *doc["choices"]))
            ]
        context, before = self.as_chat(doc["prompt"]), "" if self.templated else " "
        return [
            Instance("loglikelihood", doc, (context, f"{before}{option}"), index, metadata=kwargs["metadata"])
            for index, option in enumerate(doc["choices"])
        ]

    def make_row(self, doc: Mapping[str, Any], results: Sequence[Any]) -> ChoiceRow:
        """The scores of one study's options."""
        ids = doc["study_id"], doc["patient_id"], doc["split"]
        if self.answered_by == "similarity":
            asked, *options = (answer.vector for answer in results)
            return ChoiceRow(*ids, "", tuple(float(asked @ option) for option in options))
        return ChoiceRow(*ids, "", tuple(float(value) for value, _ in results))

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Accuracy by log-likelihood, and by log-likelihood per byte, overall and on abnormal studies; calibration."""
        return (*(f"{score}{part}" for part in PARTS for score in SCORES), *OPTION_CALIBRATION)

    def lower_is_better(self) -> frozenset[str]:
        """What is an error."""
        return frozenset(OPTION_CALIBRATION)

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
        estimates |= self._calibration(rows, docs)
        return {name: estimates[name] for name in self.metric_names()}

    def _calibration(self, rows: Sequence[ChoiceRow], docs: Sequence[Mapping[str, Any]]) -> Mapping[str, Estimate]:
        """Of the softmax of the log-likelihoods over the options: how sure a model is that is made to choose."""
        scores = np.array([row.option_scores for row in rows])
        reason = None if rows else "no study"
        if self.answered_by == "similarity":
            reason = "cosines are no probabilities"
        elif not np.isfinite(scores).all():
            reason = "not every answer is a number"
        if reason is not None:
            return dict.fromkeys(OPTION_CALIBRATION, Estimate.undefined(reason, n=len(rows)))
        truth = np.eye(OPTIONS)[[doc["target"] for doc in docs]]
        return option_calibration(truth, softmax(scores, axis=1), np.array([row.study_id for row in rows]))

    def _hits(self, rows: Sequence[ChoiceRow], docs: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Probability of the right answer by each score, (n, 2)."""
        truth = np.array([doc["target"] for doc in docs])
        return np.stack([choice_hits(scores, truth) for scores in self._scores(rows, docs)], axis=1)

    def _scores(self, rows: Sequence[ChoiceRow], docs: Sequence[Mapping[str, Any]]) -> list[NDArray[np.float64]]:
        """What `SCORES` choose by, (n, options) each."""
        scores = np.array([row.option_scores for row in rows])
        if self.answered_by == "similarity":  # which does not grow with the text
            return [scores, scores]
        size = np.array([[len(option.encode()) for option in doc["choices"]] for doc in docs])
        return [scores, scores / size]

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds what read the labels, what was left out, and how many answers were no numbers."""
        labeler = self.reader.labeler
        return {
            **super().details(),
            "distractors": self.distractors,
            "answered_by": self.answered_by,
            "abnormal_by": self.abnormal_by,
            "read_by": {"labeler": f"{labeler.name} {labeler.version}"},
            "counts": {
                "studies": len(self.documents),
                "abnormal_studies": sum(doc["abnormal"] for doc in self.documents),
                **self.left_out(),
                "studies_without_distractors": len(self.pairs) - len(self.documents),
                "answers_not_a_number": sum(math.isnan(value) for row in self.rows for value in row.option_scores),
            },
            "right_places": dict(sorted(Counter(doc["target"] for doc in self.documents).items())),
        }

    def score_records(self, rows: Sequence[ChoiceRow]) -> Iterator[dict[str, Any]]:
        """One record per study and score; the answer holds the places of the options that share the choice."""
        if not rows:
            return
        docs = [self._documents_by_study[row.study_id] for row in rows]
        scores = np.nan_to_num(np.stack(self._scores(rows, docs), axis=1), nan=-np.inf)
        best = scores == scores.max(axis=2, keepdims=True)  # (n, 2, options)
        for row, values, its in zip(rows, self._hits(rows, docs).tolist(), best, strict=True):
            for score, value, chosen in zip(SCORES, values, its, strict=True):
                answer = "+".join(map(str, np.flatnonzero(chosen)))
                yield self.score_record(row, score, value=value, answer=answer)


def _generator(study_id: str, what: str) -> np.random.Generator:
    """Random numbers of one study, for one purpose."""
    digest = hashlib.sha256(f"{what}:{study_id}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
