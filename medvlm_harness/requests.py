"""The contract between tasks and backends: what a task asks, and what a backend answers.

lm-eval calls `getattr(lm, request_type)(instances)`. Beside its own `loglikelihood` and `generate_until` there are

| request type   | arguments                                         | response                                        |
|----------------|---------------------------------------------------|-------------------------------------------------|
| `embed`        | one `ImageRef` or one `TextRef`                   | `Embedding`: float32, unit length, (d,)         |
| `embed_tokens` | one `TextRef`                                     | `TokenVectors`: float32 (tokens, d) and offsets |
| `classify`     | one `ImageRef` or one `TextRef`, a `LabelSet`,    | `LabelScores`: margin (L,), probability (L,)    |
|                | and where there is one the indication, `TextRef`  |                                                 |
| `profile`      | a workload's name, which lm-eval logs, `Workload` | `Profile`: durations, memory, sizes             |

In `generate_until` and `loglikelihood` images are the third argument, `{"visual": [ImageRef, ...]}`; `<image>` in the
text says where each of them stands. The indication is for models that read; dual encoders ignore it.

Our backends answer `generate_until` with a `Generation`, a string that says whether the model came to an end.

References are strings (content hashes) with the path or the text beside them, so that logged samples hold ids, scores
and hashes, and neither pixels, texts nor vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import label_key
from medvlm_harness.errors import UserError, near_matches

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Capability",
    "Embedding",
    "Exemplar",
    "Generation",
    "ImagePerturbation",
    "ImageRef",
    "Label",
    "LabelScores",
    "LabelSet",
    "Profile",
    "PromptWithFloors",
    "TextRef",
    "TimedBatches",
    "TimingProtocol",
    "TokenVectors",
    "Workload",
    "capabilities_of",
    "floors_of",
]

Capability = Literal[
    "classify:image",
    "classify:text",
    "embed:image",
    "embed:text",
    "embed_tokens",
    "generate_until",
    "loglikelihood",
    "loglikelihood_rolling",
    "profile",
]
"""What a backend can do: a request type, and the kind of input where that matters."""


def capabilities_of(lm: Any) -> frozenset[Capability] | None:
    """What a model can do as it was asked for; None for one of somebody else's, which does not say."""
    declared: frozenset[Capability] | None = getattr(lm, "CAPABILITIES", None)
    return None if declared is None else declared - getattr(lm, "lacks", {}).keys()


class ImagePerturbation(Protocol):
    """A change to an image before a model sees it, such as `perturbations.image.Case`; hashable, and pickles."""

    @property
    def identity(self) -> str:
        """All that decides the changed pixels beside the image."""

    def __call__(self, image: Image, *, key: str) -> Image:
        """The changed image, of the same size and mode; `key` is the hash of the file's bytes."""


class ImageRef(str):
    """An image, as the sha256 of its file's bytes; `path` says where the file lies, its pixels are never held.

    Of a perturbed image the string is the hash of both, and `file_sha256` that of the file alone.
    """

    __slots__ = ("file_sha256", "path", "perturbation")
    file_sha256: str
    path: Path
    perturbation: ImagePerturbation | None

    def __new__(cls, sha256: str, path: Path, perturbation: ImagePerturbation | None = None) -> ImageRef:
        """The hash as the string, and beside it where the file lies and what is done to the picture."""
        identity = sha256
        if perturbation is not None:
            identity = hashlib.sha256(f"{perturbation.identity} {sha256}".encode()).hexdigest()
        ref = super().__new__(cls, identity)
        ref.file_sha256, ref.path, ref.perturbation = sha256, path, perturbation
        return ref

    def __reduce__(self) -> tuple[type[ImageRef], tuple[str, Path, ImagePerturbation | None]]:
        return ImageRef, (self.file_sha256, self.path, self.perturbation)

    def perturbed(self, perturbation: ImagePerturbation) -> ImageRef:
        """The same file, to be seen changed."""
        return ImageRef(self.file_sha256, self.path, perturbation)


class TextRef(str):
    """A text, as the sha256 of its UTF-8 bytes; `text` is the text itself."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> TextRef:
        """The hash of the text as the string, and the text beside it."""
        ref = super().__new__(cls, hashlib.sha256(text.encode()).hexdigest())
        ref.text = text
        return ref

    def __reduce__(self) -> tuple[type[TextRef], tuple[str]]:
        return TextRef, (self.text,)


class Exemplar(NamedTuple):
    """An image of the train split with the text that belongs to it: what the floor `neighbour` searches and answers."""

    image: ImageRef
    text: str


class PromptWithFloors(str):
    """The prompt of a `generate_until` request, and beside it what floors answer: kind (`constant`, ...) -> text.

    A model under test sees the string alone. `medvlm-baseline` answers with what its kind is given here, so that a task
    decides what a floor is (`metrics/summary_floors.py` has them for summaries), and fits them on its training split.
    The exemplars are one object for all prompts of a task.
    """

    __slots__ = ("exemplars", "floors")
    floors: Mapping[str, str]
    exemplars: Sequence[Exemplar]

    def __new__(cls, prompt: str, floors: Mapping[str, str], exemplars: Sequence[Exemplar] = ()) -> PromptWithFloors:
        """The prompt as the string, and what floors need beside it."""
        made = super().__new__(cls, prompt)
        made.floors, made.exemplars = floors, exemplars
        return made

    def __reduce__(self) -> tuple[type[PromptWithFloors], tuple[str, dict[str, str], Sequence[Exemplar]]]:
        return PromptWithFloors, (str(self), dict(self.floors), self.exemplars)


def floors_of(argument: Any, doc: Any) -> Mapping[str, str]:
    """What a task hands over for floors: beside its prompt, or in its documents under `floors`; empty where nothing."""
    handed = getattr(argument, "floors", None) or (doc.get("floors") if isinstance(doc, Mapping) else None)
    texts = handed if isinstance(handed, Mapping) else {}
    return {str(kind): text for kind, text in texts.items() if isinstance(text, str)}


@dataclass(frozen=True, slots=True)
class Embedding:
    """One unit-length vector, shape (d,), float32, and whether the tokenizer had to cut the text (None for images)."""

    vector: NDArray[np.float32]
    truncated: bool | None = None

    def __str__(self) -> str:
        return f"embedding@{hashlib.sha256(self.vector.tobytes()).hexdigest()[:12]}"

    def to_bytes(self) -> bytes:
        """As it is stored: one byte for `truncated` (0 None, 1 False, 2 True), then little-endian float32."""
        flag = 0 if self.truncated is None else 1 + self.truncated
        return bytes([flag]) + self.vector.astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, stored: bytes) -> Embedding:
        """What `to_bytes` gave, bit for bit.

        Raises:
            ValueError: if it is nothing of the kind.
        """
        if len(stored) < 5 or stored[0] > 2:
            raise ValueError(f"Expected a stored embedding, but got {len(stored)} other bytes.")
        vector = np.frombuffer(stored, dtype="<f4", offset=1).astype(np.float32)
        return cls(vector, None if stored[0] == 0 else stored[0] == 2)


@dataclass(frozen=True, slots=True, eq=False)
class TokenVectors:
    """The tokens of one text, without special ones; those that did not fit into the model are left out."""

    vectors: NDArray[np.float32]  # (tokens, d), of any length
    offsets: tuple[tuple[int, int], ...]  # characters of the text, end excluded

    def __str__(self) -> str:
        return f"token_vectors@{hashlib.sha256(self.vectors.tobytes()).hexdigest()[:12]}"


class Generation(str):
    """A generated text; `finished` is False where the longest allowed length ended it, not the model or a stop string.

    Stock backends answer with plain strings, which do not say it: use `getattr(response, "finished", None)`.
    """

    __slots__ = ("finished",)
    finished: bool | None

    def __new__(cls, text: str, finished: bool | None = None) -> Generation:
        """The text as the string, and whether it came to an end beside it; lm-eval casts references to this type."""
        generation = super().__new__(cls, text)
        generation.finished = finished
        return generation

    def __reduce__(self) -> tuple[type[Generation], tuple[str, bool | None]]:
        return Generation, (str(self), self.finished)


class LabelScores(NamedTuple):
    """Scores of one image or text for each label of a set, in its order.

    Margins rank, on any scale. Probabilities are in [0, 1], on the scale that the model's card names; those of a
    multiclass set sum to 1.
    """

    margin: tuple[float, ...]
    probability: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Label:
    """One label with the phrases that say it is there, the phrases that say it is not, and a yes/no question."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()
    question: str = ""

    @property
    def key(self) -> str:
        """The label's name in metric names: lower case, underscores for spaces."""
        return label_key(self.name)


@dataclass(frozen=True, slots=True)
class LabelSet:
    """What a `classify` request asks about: independent labels (multilabel) or exclusive options (multiclass)."""

    name: str
    kind: Literal["multilabel", "multiclass"]
    labels: tuple[Label, ...]
    # Share of positives in the train split, per label: what the floor `medvlm-baseline kind=prior` answers.
    prior: tuple[float | None, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.name}@{self.sha256[:12]}"

    @property
    def names(self) -> tuple[str, ...]:
        """The label names, in order."""
        return tuple(label.name for label in self.labels)

    @property
    def sha256(self) -> str:
        """Identity of everything that a model sees of this set: kind, names, phrases and questions."""
        content = [self.kind, [[x.name, x.positive, x.negative, x.question] for x in self.labels]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def from_config(cls, name: str, config: Any) -> LabelSet:
        """Read the `labels:` of a task's YAML.

        Three forms: a list of names (phrases are the lower-case name and "no " + it); a mapping of names to
        `{positive: [...], negative: [...], question: ...}`; and `{kind: multiclass, options: {name: phrase}}`.

        Raises:
            UserError: if it is none of these, has unknown keys, or a phrase is missing.
        """
        if isinstance(config, Mapping) and config.get("kind") == "multiclass":
            _refuse_unknown(config, {"kind", "options"}, f"labels of {name}")
            options = config.get("options")
            if not isinstance(options, Mapping) or len(options) < 2:
                raise UserError(
                    f"Expected labels.options of {name} to map two or more names to phrases, got {options!r}."
                )
            labels = tuple(Label(str(key), _phrases(phrase, f"{name}: {key}")) for key, phrase in options.items())
            return cls(name, "multiclass", labels)
        if isinstance(config, Mapping) and config:
            return cls(name, "multilabel", tuple(_label(str(key), spec, name) for key, spec in config.items()))
        if isinstance(config, Sequence) and not isinstance(config, str) and config:
            if len(set(map(str, config))) < len(config):
                raise UserError(f"Expected each label of {name} once, but got {list(config)}.")
            return cls(name, "multilabel", tuple(_label(str(key), {}, name) for key in config))
        raise UserError(f"Expected labels of {name} to be a list of names or a mapping of names, but got {config!r}.")


@dataclass(frozen=True, slots=True)
class TimingProtocol:
    """How long and in which batches a workload is measured."""

    warm_up: int = 3  # iterations before each measurement
    iterations: int = 10  # at least, of a batch size
    seconds: float = 10.0  # at least, of a batch size
    new_tokens: int = 64  # that each text has, no more and no less
    max_batch_size: int | None = None  # None: what the backend takes at most

    @property
    def is_full(self) -> bool:
        """Whether it measures as long as the field's convention asks."""
        return self.iterations >= 10 and self.seconds >= 10


@dataclass(frozen=True, slots=True)
class Workload:
    """What a `profile` request has measured: requests of one type, answered again and again.

    Without inputs nothing is measured: another process of the run does it.
    """

    request: Literal["classify", "embed", "generate_until"]
    inputs: tuple[tuple[Any, ...], ...]  # arguments of each request, of different content; generation options left out
    protocol: TimingProtocol = field(default_factory=TimingProtocol)

    def __str__(self) -> str:
        content = [self.request, [[str(one) for one in arguments] for arguments in self.inputs]]
        return f"workload@{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class TimedBatches:
    """Iterations of one batch size, each over other inputs; seconds from files and texts to answers."""

    batch_size: int
    seconds: tuple[float, ...]
    stages: Mapping[str, tuple[float, ...]]  # of them, what each stage took (see model_backends/meter.py)
    memory: Mapping[str, Any]  # peaks in MiB meanwhile
    first_token_seconds: tuple[float, ...] = ()  # of iterations of their own over the same inputs; of generators
    tokens: tuple[int, ...] = ()  # written in each iteration; of generators

    @property
    def items_per_second(self) -> float:
        """Items by the time that all iterations took."""
        return self.batch_size * len(self.seconds) / sum(self.seconds)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a workload costs on one machine. Sizes in MiB; what is None has its reason in `reasons`, by its name."""

    single: TimedBatches  # one item at a time
    best: TimedBatches  # the batch size with the most items per second
    searched: tuple[tuple[int, float], ...]  # batch sizes that were tried, in order, with items per second
    search_ended: str
    load_seconds: float | None
    parameters: int
    parameters_active: int  # that one token or image goes through: less than all in a mixture of experts
    parameters_trainable: int
    weights_memory_mib: float
    weights_disk_mib: float | None
    gflops_per_item: float | None
    hardware: Mapping[str, Any]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"profile of {len(self.single.seconds)} + {len(self.best.seconds)} iterations"


def _label(key: str, spec: Any, owner: str) -> Label:
    if not isinstance(spec, Mapping):
        raise UserError(f"Expected label {key!r} of {owner} to be a mapping with positive and negative, got {spec!r}.")
    _refuse_unknown(spec, {"positive", "negative", "question"}, f"label {key!r} of {owner}")
    words = key.lower().replace("_", " ")
    positive = _phrases(spec.get("positive", words), f"{owner}: {key}.positive")
    negative = _phrases(spec.get("negative", f"no {words}"), f"{owner}: {key}.negative")
    return Label(key, positive, negative, str(spec.get("question", f"Is there {words}?")))


def _phrases(value: Any, where: str) -> tuple[str, ...]:
    phrases = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
        raise UserError(f"Expected one or more phrases for {where}, but got {value!r}.")
    return phrases


def _refuse_unknown(config: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in config:
        if key not in known:
            raise UserError(f"Unknown key {key!r} in {where}.{near_matches(str(key), known)}")
