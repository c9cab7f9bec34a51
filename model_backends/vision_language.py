"""What all generative models share that see images: requests with images, and labels from the likelihood of answers.

A subclass turns one user turn with its images into tokens, and says what goes into the model for the images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from scipy.special import expit, logsumexp

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.dual_encoder import log_odds_and_softmax
from medvlm_harness.model_backends.generative import GenerativeBackend, StoredAnswer
from medvlm_harness.model_backends.image_preparation import find_preparation
from medvlm_harness.model_backends.sequences import Prompt, Scored
from medvlm_harness.model_backends.shared_prefill import shared_scores
from medvlm_harness.requests import Capability, ImageRef, LabelScores, LabelSet

__all__ = ["IMAGE_PLACE", "VisionLanguageBackend"]

IMAGE_PLACE = "<image>"  # marks an image's place in a prompt, as in lm-eval's own tasks
AnswerScoring = Literal["full", "first-token"]
YES, NO = ("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no")
YES_NO = "Answer with yes or no."
WHICH, ONE_OF = "Which of these does the image show?", "Answer with one of them, word for word."


class _Question(NamedTuple):
    """One question about an image, and the answers whose likelihoods decide; each answer in all its spellings."""

    text: str
    answers: tuple[tuple[str, ...], ...]


class VisionLanguageBackend(GenerativeBackend):
    """A causal model that sees images: `generate_until`, `loglikelihood` and `classify`.

    `classify` asks the label's question ("Is there edema? Answer with yes or no."), after the indication where the
    request has one. The margin is log p(yes) - log p(no) in nats, the probability that of yes against no. An answer
    counts in all its spellings (with and without a capital and a leading blank): how it is spelt depends on the
    template that comes before it. `answer_scoring=full` takes whole answers, `first-token` the first token of each
    spelling, without those that both answers begin with. Of a multiclass set one question lists the options (the first
    phrase of each); an option's score is the likelihood of its phrases, its probability the softmax over the options,
    its margin the log-odds against the rest.

    All answers about one image share one pass over it (`shared_prefill.py`), where the image comes before the question.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset(
        {"generate_until", "loglikelihood", "classify:image", "profile"}
    )

    def __init__(
        self, *, answer_scoring: AnswerScoring = "full", preprocessing: str | None = None, **options: Any
    ) -> None:
        self.preparation = find_preparation(preprocessing)
        super().__init__(**options)
        if answer_scoring not in ("full", "first-token"):
            raise UserError(f"Expected answer_scoring to be full or first-token, but got {answer_scoring!r}.")
        self.answer_scoring = answer_scoring
        self.images_classified = self.classifications_recalled = 0

    # --- for subclasses, beside `stack`

    @abstractmethod
    def encode_turn(self, text: str, images: Sequence[ImageRef]) -> Prompt:
        """One turn of a user as tokens, up to where the model's answer begins.

        Args:
            text: with `<image>` at the place of each image, or without any: then they stand before it.
            images: in order.
        """

    # --- requests with images: ({prompt}, {"visual": [...]}), ({context}, {continuation}, {"visual": [...]})

    def encode_prompt(self, arguments: Sequence[Any], room: int) -> Prompt:
        """A user's turn in `room` tokens; text alone is cut from its left, images are not."""
        prompt = self.encode_turn(str(arguments[0]), images_of(arguments[1:]))
        return self._fitting(prompt, room)

    def encode_pair(self, arguments: Sequence[Any]) -> Scored:
        """A user's turn, and what the model is to answer."""
        context, continuation = str(arguments[0]), str(arguments[1])
        ids = self.answer_ids(continuation)
        prompt = self.encode_turn(context, images_of(arguments[2:]))
        return Scored(self._fitting(prompt, self.max_length + 1 - len(ids)), ids)

    def encode_windows(self, text: str) -> list[Scored]:
        """Nothing: a model of conversations is not asked for whole texts."""
        raise self._cannot("loglikelihood_rolling")

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The tokens of an answer by itself."""
        ids = self.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError(f"Expected an answer of one token or more, but got {answer!r}.")
        return tuple(ids)

    def _fitting(self, prompt: Prompt, room: int) -> Prompt:
        over = len(prompt.ids) - room
        if over <= 0:
            return prompt
        if prompt.images or room < 1:
            raise UserError(
                f"A prompt with {len(prompt.images)} images takes {len(prompt.ids)} tokens, but there is room for "
                f"{room}: use fewer images or a smaller max_gen_toks, or say max_length=N if the model takes more."
            )
        return Prompt(prompt.ids[over:], cut=over)

    # --- classify

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        """Scores of each image for each label of its set."""
        inputs = {self.input_key(request.arguments): request.arguments for request in requests}

        def compute(missing: Sequence[str]) -> Iterator[dict[str, StoredAnswer]]:
            first = _items(self._questions(inputs[missing[0]]))
            rows = self._rows(first)
            with self._progress("Classifying", len(missing), 1) as progress:
                for slot in slots(missing, max(1, rows // len(first))):
                    with self.meter.stage("score", len(slot)):
                        parts = self.batching.in_parts(
                            slot, lambda part: self._label_scores([inputs[key] for key in part], rows)
                        )
                    scores = [one for part in parts for one in part]
                    yield {key: StoredAnswer(list(one), 0) for key, one in zip(slot, scores, strict=True)}
                    progress.update(len(slot))

        answers = self._answered("classify", self.answer_scoring, inputs, compute)
        self.images_classified += len(answers.computed)
        self.classifications_recalled += len(answers.recalled)
        found = (answers.of[self.input_key(request.arguments)].value for request in requests)
        return [LabelScores(tuple(margin), tuple(probability)) for margin, probability in found]

    def _rows(self, items: Sequence[Scored]) -> int:
        """Sequences in one forward pass, judged by the items of one request."""
        longest = max(items, key=len)
        logits = len(longest) - longest.prompt.image_end
        return self._size(self.batching, lambda n: self.decoder.score([longest] * n), len(longest), logits)

    def _label_scores(self, requests: Sequence[Sequence[Any]], rows: int) -> list[LabelScores]:
        """Scores of several requests, each of which is one group of items."""
        asked = [self._questions(arguments) for arguments in requests]
        groups = [_items(questions) for questions in asked]
        found = []
        for arguments, questions, items, scores in zip(
            requests, asked, groups, shared_scores(self.decoder, groups, rows=rows), strict=True
        ):
            likelihood = {item: score for item, (score, _) in zip(items, scores, strict=True)}
            totals = [[float(logsumexp([likelihood[item] for item in answer])) for answer in q] for q in questions]
            found.append(_label_scores(arguments[1], totals))
        return found

    def _questions(self, arguments: Sequence[Any]) -> list[list[list[Scored]]]:
        """For each question, for each answer, its spellings as items."""
        image, label_set, *context = arguments
        found = []
        for question in questions_about(label_set, indication=str(getattr(context[0], "text", "")) if context else ""):
            prompt = self._fitting(self.encode_turn(question.text, [image]), self.max_length)
            found.append([[Scored(prompt, ids) for ids in spelt] for spelt in self._spellings(question.answers)])
        return found

    def _spellings(self, answers: Sequence[Sequence[str]]) -> list[list[tuple[int, ...]]]:
        """The tokens of each answer's spellings, each once; of first tokens, those of one answer alone."""
        spelt = [list(dict.fromkeys(self.answer_ids(spelling) for spelling in answer)) for answer in answers]
        if self.answer_scoring == "full":
            return spelt
        first = [list(dict.fromkeys(ids[:1] for ids in own)) for own in spelt]
        alone = [[ids for ids in own if sum(ids in other for other in first) == 1] for own in first]
        if not all(alone):
            raise UserError(
                "The answers begin with the same tokens, which answer_scoring=first-token cannot tell apart."
            )
        return alone

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds how labels are asked for, and how many images were."""
        return {
            **super().describe(),
            "probability_scale": self.card.probability_scale,
            "answer_scoring": self.answer_scoring,
            "preprocessing": str(self.preparation),
            "images_classified": self.images_classified,
            "classifications_recalled": self.classifications_recalled,
        }


def questions_about(label_set: LabelSet, *, indication: str = "") -> list[_Question]:
    """The questions of a label set: one per label of a multilabel set, one for all options of a multiclass one."""
    before = f"Indication: {indication.strip()}\n" if indication.strip() else ""
    if label_set.kind == "multilabel":
        return [_Question(f"{before}{label.question} {YES_NO}", (YES, NO)) for label in label_set.labels]
    options = tuple(label.positive for label in label_set.labels)
    listed = "\n".join(phrases[0] for phrases in options)
    spelt = tuple(tuple(blank + phrase for phrase in phrases for blank in ("", " ")) for phrases in options)
    return [_Question(f"{before}{WHICH}\n{listed}\n{ONE_OF}", spelt)]


def images_of(rest: Sequence[Any]) -> tuple[ImageRef, ...]:
    """The images of a request: what stands under `visual` in its last argument, lm-eval's own form.

    Raises:
        UserError: if they are no references.
    """
    visual = [one for argument in rest if isinstance(argument, Mapping) for one in argument.get("visual", ())]
    for one in visual:
        if not isinstance(one, ImageRef):
            raise UserError(f"Expected the images of a request to be ImageRef, but got {type(one).__name__}.")
    return tuple(visual)


def turn_parts(text: str, images: int) -> list[str | None]:
    """A turn as texts and, as None, the places of images.

    Raises:
        UserError: if the text has other than no or `images` places.
    """
    texts = text.split(IMAGE_PLACE)
    places = len(texts) - 1
    if places == 0:
        return [*([None] * images), text]
    if places != images:
        raise UserError(
            f"A prompt has {places} places for images ({IMAGE_PLACE}), but the request has {images} images."
        )
    parts: list[str | None] = [texts[0]]
    for one in texts[1:]:
        parts += [None, one]
    return [part for part in parts if part != ""]


def _items(questions: Sequence[Sequence[Sequence[Scored]]]) -> list[Scored]:
    """Everything that is scored for one request, each once."""
    return list(dict.fromkeys(item for question in questions for answer in question for item in answer))


def _label_scores(label_set: LabelSet, totals: Sequence[Sequence[float]]) -> LabelScores:
    """Scores from the log-likelihoods of the answers to each question."""
    if label_set.kind == "multilabel":
        margin = tuple(yes - no for yes, no in totals)
        return LabelScores(margin, tuple(expit(margin).tolist()))
    odds, probability = log_odds_and_softmax(np.array(totals))
    return LabelScores(tuple(odds[0].tolist()), tuple(probability[0].tolist()))
