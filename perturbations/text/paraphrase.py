"""Questions, instructions and prompts of labels in other words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from medvlm_harness.perturbations.text.base import Level, TextPerturbation
from medvlm_harness.perturbations.text.guard import Edit, reading, sentence_spans
from medvlm_harness.perturbations.text.terms import terms
from medvlm_harness.requests import Label

__all__ = ["PARAPHRASE", "Question", "as_stated", "paraphrases", "parse_question", "prompt_variants"]

# Then the template does not fit: "Is there pneumothorax present?", "Is there edema, and is it mild?".
_MORE_THAN_A_THING = re.compile(
    r"\A(?:there|it|this)\b|[?,;]|\b(?:is|are|does|can|present|visible|seen)\b", re.IGNORECASE
)
_DENIAL = re.compile(r"(?:no|without|absence of)\s+(?P<x>.+)", re.IGNORECASE)


class Question(NamedTuple):
    """A question that fits a template."""

    group: str  # singular or plural
    template: str
    x: str  # what is asked about
    image: str  # the question's word for the image


def parse_question(question: str) -> Question | None:
    """What a yes/no question asks about; None where it fits no template."""
    asked, groups = " ".join(question.split()), terms().questions
    for template in sorted({template for group in groups.values() for template in group}, key=len, reverse=True):
        match = _question_pattern(template).fullmatch(asked)
        if match and not _MORE_THAN_A_THING.search(match["x"]):
            fitting = [name for name, group in groups.items() if template in group]
            group = fitting[0] if len(fitting) == 1 else "plural" if _looks_plural(match["x"]) else "singular"
            return Question(group, template, match["x"], match.groupdict().get("image") or "image")
    return None


def paraphrases(question: str) -> tuple[str, ...]:
    """A yes/no question in all other words that terms.yaml has for it; none where it has none.

    >>> paraphrases("Is there pneumothorax?")[:2]
    ('Does this image show pneumothorax?', 'Is pneumothorax present?')
    """
    parsed = parse_question(question)
    if parsed is None:
        return ()
    said = (
        template.replace("image", parsed.image).format(x=parsed.x)
        for template in terms().questions[parsed.group]
        if template != parsed.template
    )
    wanted = reading(question, as_stated)
    return tuple(other for other in said if reading(other, as_stated) == wanted)


def as_stated(text: str) -> str:
    """A text without question marks: to the labeler they make everything uncertain."""
    return text.replace("?", "")


def prompt_variants(label: Label, *, image: str = "image") -> tuple[Label, ...]:
    """A label with the same name and other phrases and question, for ensembles and for robustness against prompts.

    Pairs of templates (`x` against `no x`) and synonyms go on labels whose negative phrases deny their positive ones;
    frames around the phrases go on all. The labeler reads each phrase as it reads the label's own. `image` is the word
    for the images, such as "chest radiograph".
    """
    questions = paraphrases(label.question)
    variants: list[Label] = []
    for positive, negative in _phrasings(label, image):
        question = questions[len(variants) % len(questions)] if questions else label.question
        variant = replace(label, positive=positive, negative=negative, question=question)
        if (positive, negative) != (label.positive, label.negative) and _reads_alike(label, variant):
            variants.append(variant)
    return tuple(variants)


def _phrasings(label: Label, image: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Positive and negative phrases in other words."""
    denied = [match["x"] if (match := _DENIAL.fullmatch(phrase)) else None for phrase in label.negative]
    if denied and set(denied) <= set(label.positive):
        for yes, no in terms().prompt_pairs:
            yield _filled(yes, label.positive, image), _filled(no, map(str, denied), image)
        others = [terms().synonyms.get(phrase, ()) for phrase in label.positive]
        for names in zip(*others, strict=False):  # none where one phrase has no synonym
            renamed = dict(zip(label.positive, names, strict=True))
            yield names, tuple(f"no {renamed[str(x)]}" for x in denied)
    for frame in terms().prompt_frames:
        yield _filled(frame, label.positive, image), _filled(frame, label.negative, image)


def _filled(template: str, phrases: Iterable[str], image: str) -> tuple[str, ...]:
    return tuple(template.format(x=phrase, image=image) for phrase in phrases)


def _reads_alike(label: Label, variant: Label) -> bool:
    """Whether labels and sides of every phrase are the same; of cues "no" and "without" may stand for each other."""
    pairs = zip((*label.positive, *label.negative), (*variant.positive, *variant.negative), strict=True)
    readings = [(reading(old), reading(new)) for old, new in pairs]
    return all(
        (old.labels, old.sides, len(old.negations)) == (new.labels, new.sides, len(new.negations))
        for old, new in readings
    )


def _paraphrased(text: str, level: Level, rng: np.random.Generator) -> list[Edit]:
    """Each question or instruction of a prompt in its n-th other words; where it has fewer it stays as it is."""
    edits = []
    for start, end in sentence_spans(text):
        sentence = text[start:end].strip()
        others = paraphrases(sentence) or _instructions().get(sentence, ())
        if len(others) >= int(level):
            begin = start + text[start:end].index(sentence)
            edits.append(Edit(begin, begin + len(sentence), others[int(level) - 1]))
    return edits


@cache
def _instructions() -> dict[str, tuple[str, ...]]:
    """Instruction -> the others of its group."""
    groups = terms().instructions
    return {one: tuple(other for other in group if other != one) for group in groups for one in group}


def _looks_plural(x: str) -> bool:
    """Whether the last word is a plural: "opacities", but neither "atelectasis" nor "mass"."""
    return x.endswith("s") and not x.endswith(("ss", "is", "us"))


@cache
def _question_pattern(template: str) -> re.Pattern[str]:
    words = "|".join(sorted(map(re.escape, terms().image_words), key=len, reverse=True))
    pattern = re.escape(template).replace(r"\{x\}", "(?P<x>.+)").replace("image", f"(?P<image>{words})")
    return re.compile(pattern, re.IGNORECASE)


PARAPHRASE = TextPerturbation(
    "paraphrase",
    of=("prompt",),
    levels=(1.0, 2.0, 3.0, 4.0),
    apply=_paraphrased,
    read=as_stated,
    says="questions and instructions in the first, second, third or fourth of their other words",
)
