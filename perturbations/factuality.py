"""Factuality filters: sentences of a generated report that should not be there, taken out after generation.

lm-eval's filters, for `filter_list` of a task: one run then shows a metric of the texts as generated beside the same
metric of the filtered texts, as `rougeL,none` beside `rougeL,no_prior`. What a filter takes out is gone from every
metric of its pipeline; recall of findings shows what that costs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.filter import Filter

from medvlm_harness.errors import UserError
from medvlm_harness.labelers.base import labeler_from_text
from medvlm_harness.metrics.factuality import claims_prior, contradictions, sentence_words, unsupported_findings
from medvlm_harness.metrics.sentences import split_sentences
from medvlm_harness.requests import Generation

__all__ = ["DropPriorClaims", "DropRepetitions", "DropUnsupported"]


class _SentenceFilter(Filter):  # type: ignore[misc]  # lm-eval carries no types
    """Keeps the sentences of each response that `kept` gives back; a response without any other is left as it is."""

    def apply(self, resps: Iterable[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Every response to every document, filtered; whether generation came to an end stays known."""
        return [[self._filtered(text, doc) for text in texts] for texts, doc in zip(resps, docs, strict=True)]

    def _filtered(self, text: str, doc: Mapping[str, Any]) -> str:
        sentences = split_sentences(text)
        kept = self.kept(sentences, doc)
        return text if len(kept) == len(sentences) else Generation(" ".join(kept), getattr(text, "finished", None))

    @abstractmethod
    def kept(self, sentences: Sequence[str], doc: Mapping[str, Any]) -> list[str]:
        """The sentences to keep, in order."""


class DropPriorClaims(_SentenceFilter):
    """`drop_prior_claims`: sentences that compare with an earlier study, by the strict list of factuality.yaml.

    Whether there is an earlier study does not matter: a model that sees one study cannot know of it.
    """

    def kept(self, sentences: Sequence[str], doc: Mapping[str, Any]) -> list[str]:
        """Those that claim no prior."""
        return [sentence for sentence in sentences if not claims_prior(sentence)]


class DropRepetitions(_SentenceFilter):
    """`drop_repetitions`: sentences that were said before, but for case and marks."""

    def kept(self, sentences: Sequence[str], doc: Mapping[str, Any]) -> list[str]:
        """The first of each."""
        first: dict[tuple[str, ...], str] = {}
        for sentence in sentences:
            first.setdefault(sentence_words(sentence), sentence)
        return list(first.values())


class DropUnsupported(_SentenceFilter):
    """`drop_unsupported`: sentences with a finding that the document's source denies, or neither has nor suspects.

    Args:
        labeler: as for `medvlm label`, for example "rules" or "chexbert,weights=FILE".
    """

    def __init__(self, labeler: str = "rules") -> None:
        super().__init__()
        self._labeler = labeler_from_text(labeler)

    def kept(self, sentences: Sequence[str], doc: Mapping[str, Any]) -> list[str]:
        """Those that the source supports.

        Raises:
            UserError: if the documents of a task have no `source`.
        """
        if not isinstance(doc.get("source"), str):
            raise UserError("The filter drop_unsupported needs the `source` of each document: use it with our tasks.")
        source = self._labeler.label(doc["source"])
        return [sentence for sentence in sentences if not self._is_unsupported(source, sentence)]

    def _is_unsupported(self, source: Mapping[str, int | None], sentence: str) -> bool:
        said = self._labeler.label(sentence)
        denied = {name for name in contradictions(source, said) if said[name] == 1}
        return bool(denied | unsupported_findings(source, said))
