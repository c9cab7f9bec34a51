"""What summaries score that no model wrote: floors to read every score beside, and what extraction could reach at most.

On IU-CXR the most frequent impression, for every study, scores ROUGE-L 0.49. All functions take and give plain texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from medvlm_harness.metrics._texts import checked_pairs, checked_texts, tfidf_vectorizer
from medvlm_harness.metrics.rouge import rouge_scores
from medvlm_harness.metrics.sentences import split_sentences

__all__ = ["copies", "leads", "most_frequent_summary", "nearest_summaries", "oracle_extracts"]


def most_frequent_summary(train_summaries: Iterable[str | None]) -> str:
    """The summary that most training studies have, as most of them write it; the constant floor.

    Case and white space do not matter in the count. Of equally frequent ones the first in the alphabet is taken.

    Raises:
        ValueError: if there is no summary.

    >>> most_frequent_summary(["No acute disease.", "no  acute disease.", "No acute disease.", "Edema."])
    'No acute disease.'
    """
    spellings: dict[str, Counter[str]] = {}
    for text in checked_texts(list(train_summaries), "train_summaries"):
        plain = " ".join(text.split())
        if plain:
            spellings.setdefault(plain.lower(), Counter())[plain] += 1
    if not spellings:
        raise ValueError("Expected a training summary, but all are empty.")
    _, counts = min(spellings.items(), key=lambda item: (-item[1].total(), item[0]))
    return min(counts, key=lambda text: (-counts[text], text))


def leads(sources: Sequence[str | None], *, sentences: int = 1) -> list[str]:
    """The first sentences of each source; the lead floor. "" where a source is empty.

    Args:
        sources: texts to summarise.
        sentences: how many to take, at least 1.
    """
    if sentences < 1:
        raise ValueError(f"Expected sentences to be at least 1, but got {sentences}.")
    return [" ".join(split_sentences(text)[:sentences]) for text in checked_texts(sources, "sources")]


def copies(sources: Sequence[str | None]) -> list[str]:
    """Each source as its own summary; the copy floor. Texts stay as they are, "" where there is none."""
    return checked_texts(sources, "sources")


def nearest_summaries(
    train_sources: Sequence[str | None], train_summaries: Sequence[str | None], sources: Sequence[str | None]
) -> list[str]:
    """The summary of the training study whose source is most alike; the retrieval floor.

    Alike is the cosine of TF-IDF vectors of words and word pairs, fitted on the training sources, without stop words
    taken out: "no" decides. Training studies without a source or a summary are not candidates. Where nothing is alike,
    as for an empty source, it is `most_frequent_summary`; of equally near ones the first.

    Raises:
        ValueError: if there is no training pair, or their numbers differ.
    """
    texts = checked_texts(sources, "sources")
    pairs = [pair for pair in checked_pairs(train_sources, train_summaries) if pair[0].strip() and pair[1].strip()]
    if not pairs:
        raise ValueError("Expected a training study with source and summary, but there is none.")
    vectorizer = tfidf_vectorizer()
    known = vectorizer.fit_transform([source for source, _ in pairs])
    similarity = (vectorizer.transform(texts) @ known.T).toarray()
    otherwise = most_frequent_summary(summary for _, summary in pairs)
    return [pairs[int(row.argmax())][1] if row.max() > 0 else otherwise for row in similarity]


def oracle_extracts(
    sources: Sequence[str | None], references: Sequence[str | None], *, stemmer: bool = True
) -> list[str]:
    """The sentence of each source that is most like its reference, by ROUGE-L: the ceiling of one-sentence extraction.

    It looks at the reference, so it is no model. "" where a source is empty; of equally good sentences the first.

    Args:
        sources: texts to summarise.
        references: their human summaries.
        stemmer: as for `rouge_scores`.
    """
    candidates = [(split_sentences(text), reference) for text, reference in checked_pairs(sources, references)]
    flat = [(sentence, reference) for sentences, reference in candidates for sentence in sentences]
    scores = iter(rouge_scores([s for s, _ in flat], [r for _, r in flat], stemmer=stemmer).rougeL.tolist())
    best = []
    for sentences, _ in candidates:
        scored = [next(scores) for _ in sentences]
        best.append(sentences[scored.index(max(scored))] if scored else "")
    return best
