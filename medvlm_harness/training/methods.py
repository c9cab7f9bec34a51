"""The methods of `medvlm finetune`: their names, what all of them are told, and what they hand back."""

from __future__ import annotations

import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.plugin import load_target
from medvlm_harness.training.data import TrainingData

if TYPE_CHECKING:
    from medvlm_harness.model_backends.torch_backend import TorchBackend

__all__ = ["METHODS", "BaseModel", "Method", "Schedule", "Trained", "build_method", "find_method"]

METHODS: Mapping[str, str] = {
    "causal-lm": "medvlm_harness.training.causal_lm:CausalMethod",
    "contrastive-lora": "medvlm_harness.training.contrastive_lora:ContrastiveLoraMethod",
    "masked-lm": "medvlm_harness.training.masked_lm:MaskedMethod",
    "linear-probe": "medvlm_harness.training.probe:LinearProbeMethod",
    "lora": "medvlm_harness.training.language_lora:LanguageLoraMethod",
    "medbridge": "medvlm_harness.training.medbridge:MedBridgeMethod",
    "projector": "medvlm_harness.training.projector:ProjectorMethod",
    "seq2seq": "medvlm_harness.training.seq2seq:Seq2SeqMethod",
}
"""Name -> "module:class"; imported when it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long, in what portions and in what order training goes; what is reached first ends it."""

    seconds: float | None = None  # of training and evaluation; loading does not count
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 8  # studies in a step
    seed: int = 0
    eval_steps: int | None = None  # steps between evaluations on the validation split; None is once an epoch
    patience: int = 5  # evaluations without a better one that end it

    def __post_init__(self) -> None:
        limits = {"seconds": self.seconds, "epochs": self.epochs, "steps": self.steps}
        if all(limit is None for limit in limits.values()):
            raise UserError("Expected one or more of --seconds, --epochs and --steps: how long shall it train?")
        least = {"batch_size": self.batch_size, "patience": self.patience, "eval_steps": self.eval_steps, **limits}
        for name, value in least.items():
            if value is not None and value <= 0:
                raise UserError(f"Expected {name} to be more than 0, but got {value}.")
        if self.seed < 0:
            raise UserError(f"Expected seed to be 0 or more, but got {self.seed}.")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model that what was trained stands on, unchanged."""

    name: str
    weights: Mapping[str, str]  # file -> sha256
    licence: str | None
    trained_on: Sequence[Any] | None  # as on its card; None where nothing is known
    precision: str | None = None  # that it computed in; None for a vocabulary
    quantization: Mapping[str, Any] | None = None  # how its weights were rounded; None if they were not

    @classmethod
    def of(cls, backend: TorchBackend) -> BaseModel:
        """What a backend's card and files say."""
        card = backend.card
        way = backend.quantization_identity()
        return cls(card.name, backend.weights, card.licence, card.trained_on, backend.precision, way)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a method says of the files that it wrote."""

    parameters: int  # trained ones
    steps: int
    epochs: float
    seconds: float
    best_step: int  # whose weights are kept
    validation_loss: float  # of these
    first_validation_loss: float  # before the first step
    stopped_by: str  # steps, epochs, seconds or patience
    base_models: Mapping[str, BaseModel]  # part -> model
    studies: Mapping[str, int] = field(default_factory=dict)  # split -> how many of its studies were used
    # What else the kept weights score on the validation split: METRIC, or METRIC_before, METRIC_after and
    # METRIC_after_minus_before.
    validation: Mapping[str, Estimate] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)  # what else was counted: tokens seen, ...


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to train, as frozen options; a subclass adds its own as fields with defaults, set by `--option`.

    Most stand on a base model, which is named as for an evaluation.
    """

    NAME: ClassVar[str]
    EVALUATED_BY: ClassVar[str]  # the backend that takes the output as pretrained=
    NEEDS_MODEL: ClassVar[bool] = True  # a base model
    PATHS: ClassVar[frozenset[str]] = frozenset()  # own options that name a place on this machine

    model: str = ""  # the base model's backend, a name in `medvlm models`
    model_args: str = ""  # its --model_args
    device: str | None = None
    schedule: Schedule

    @abstractmethod
    def train(self, data: TrainingData, output: Path) -> Trained:
        """Train, and write what is evaluated into the folder `output`.

        It exists; the state of a run that was killed lies there (see `loop.fit`).

        Raises:
            UserError: for options or data that do not fit, before anything long.
        """

    def evaluation(self, output: Path) -> str:
        """The options of `medvlm run` that evaluate what was written."""
        return f"--model {self.EVALUATED_BY} --model_args pretrained={output}"


_COMMON = frozenset(one.name for one in fields(Method))


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}.{near_matches(name, METHODS)}")
    found: type[Method] = load_target(METHODS[name])
    return found


def build_method(name: str, options: Sequence[str], **common: Any) -> Method:
    """A method from `key=value` texts for its own options.

    Raises:
        UserError: for an unknown method or option, a value of another kind, or an option that is missing.
    """
    cls = find_method(name)
    kinds = typing.get_type_hints(cls)
    own = {one.name: one for one in fields(cls) if one.name not in _COMMON}
    values: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"Expected --option to be key=value, but got {text!r}.")
        if key not in own:
            raise UserError(f"Unknown option {key!r} of method {name}.{near_matches(key, own)}")
        values[key] = _converted(key, value, kinds[key])
    for key, one in own.items():
        if key not in values and one.default is MISSING and one.default_factory is MISSING:
            raise UserError(f"Method {name} needs {key}: --option {key}=...")
    if bool(common.get("model")) != cls.NEEDS_MODEL:
        needs = "needs a base model: --model NAME" if cls.NEEDS_MODEL else "takes no base model: leave out --model"
        raise UserError(f"Method {name} {needs}.")
    return cls(**values, **common)


def _converted(key: str, text: str, kind: Any) -> Any:
    """A text as the annotated type: str, int, float, bool, a Literal of texts, or one of them or None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise UserError(f"Expected {key} to be one of {', '.join(choices)}, but got {text!r}.")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"Expected {key} to be true or false, but got {text!r}.")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"Expected {key} to be a {_WORDS[kind]}, but got {text!r}.") from error


_WORDS = {int: "whole number", float: "number"}
