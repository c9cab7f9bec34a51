"""What every backend of ours inherits: options, batch size, the other processes, and refusing what it cannot answer."""

from __future__ import annotations

import inspect
import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import simple_parse_args_string

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.ranks import Ranks
from medvlm_harness.requests import Capability, Embedding, LabelScores, LabelSet, Profile, TokenVectors

if TYPE_CHECKING:
    import torch

__all__ = ["MedicalLM"]

_log = logging.getLogger("lm_eval.medvlm")


class MedicalLM(LM):  # type: ignore[misc]  # lm-eval carries no types
    """A model under test.

    A subclass names its card and its capabilities, and implements the requests among them. Options are the keyword
    parameters of its constructor; an unknown one is refused before anything is loaded.
    """

    MULTIMODAL = True  # lm-eval then hashes image arguments in logged samples instead of writing their bytes
    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset()
    card: ModelCard
    floor: str | None = None  # the kind of floor text that this model's texts are made of; None for one that writes
    lacks: Mapping[str, str] = {}  # of these, what a checkpoint or an option leaves out, and why

    def __init__(self, *, batch_size: int | str | None = None, max_batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size)
        self.max_batch_size = _batch_size(max_batch_size, "max_batch_size")
        self.ranks = Ranks.from_environment()
        self._rank, self._world_size = self.ranks.rank, self.ranks.world_size
        self._device: Any = "cpu"  # of a model that is nowhere

    # --- what it can do

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        """Margins and probabilities of each image for a label set."""
        raise self._cannot("classify")

    def embed(self, requests: Sequence[Instance]) -> list[Embedding]:
        """Unit vectors of images or texts."""
        raise self._cannot("embed")

    def embed_tokens(self, requests: Sequence[Instance]) -> list[TokenVectors]:
        """Vectors of the tokens of texts."""
        raise self._cannot("embed_tokens")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations."""
        raise self._cannot("loglikelihood")

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of whole texts."""
        raise self._cannot("loglikelihood_rolling")

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy continuations."""
        raise self._cannot("generate_until")

    def profile(self, requests: Sequence[Instance]) -> list[Profile | None]:
        """What workloads cost."""
        raise self._cannot("profile")

    def refuses(self, label_set: LabelSet) -> str | None:
        """Why a label set cannot be scored; None if it can. Known before any request is made."""
        return None

    def begin(self, background: Executor) -> None:
        """Called when it is certain that there will be requests: submit what can go on while they are made."""

    def _cannot(self, request: str) -> UserError:
        return UserError(f"{self.card.name} ({self.card.family}) cannot answer `{request}` requests.")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the results file says of this model: card, hashes, precision, prompts; plain JSON."""

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to `config` of the results."""
        return {"model_num_parameters": self.card.parameters}

    # --- several processes, each with the model and a share of the studies

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one after the other."""
        return self.ranks.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What every process gives, by rank, on process `dst`; None on the others."""
        return self.ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.ranks.barrier()

    # --- options

    @classmethod
    def options(cls) -> frozenset[str]:
        """The names that --model_args may use."""
        return frozenset(cls._parameters())

    @classmethod
    def _parameters(cls) -> dict[str, inspect.Parameter]:
        """Keyword parameters of the constructor, and of the one above it where it passes `**options` on."""
        found: dict[str, inspect.Parameter] = {}
        for owner in cls.__mro__:
            constructor = vars(owner).get("__init__")
            if constructor is None:
                continue
            parameters = inspect.signature(constructor).parameters.values()
            found = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY} | found
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        return found

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Build from --model_args; lm-eval's own arguments (batch size, device) fill in what is not given there.

        Raises:
            UserError: for an unknown or missing option.
        """
        given = {k: v for k, v in (additional_config or {}).items() if v is not None and k in cls.options()}
        # Of its command line lm-eval hands on text; the integer is its own default, which means that nobody asked.
        if isinstance(given.get("batch_size"), int):
            del given["batch_size"]
        arguments = {**given, **arg_dict}
        cls.refuse_options(arguments)
        return cls(**arguments)

    @classmethod
    def refuse_options(cls, arguments: Collection[str]) -> None:
        """Check names of options.

        Raises:
            UserError: for an unknown or missing one.
        """
        for key in arguments:
            if key not in cls.options():
                raise UserError(f"Unknown option {key!r} of model {cls.card.name}.{near_matches(key, cls.options())}")
        for name, parameter in cls._parameters().items():
            if parameter.default is parameter.empty and name not in arguments:
                raise UserError(f"Model {cls.card.name} needs {name}=...: --model_args {name}=PATH_OR_NAME")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Self:
        """Build from `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)


def _batch_size(value: int | str | None, name: str = "batch_size") -> int | None:
    """A positive integer; None for automatic."""
    if value is None or (isinstance(value, str) and value.startswith("auto")):
        return None
    try:
        size = float(value)
    except ValueError:
        size = 0
    if size < 1 or size != int(size):
        raise UserError(f"Expected {name} to be a positive integer or auto, but got {value!r}.")
    return int(size)
