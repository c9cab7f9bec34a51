"""A model as the base of another: built by its name, written down with its hashes, found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from lm_eval.utils import simple_parse_args_string

from medvlm_harness import plugin
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.model_backends.dual_encoder import DualEncoder
from medvlm_harness.model_backends.torch_backend import TorchBackend

__all__ = ["base_backend", "encoder_record", "frozen_encoder", "recorded_base", "recorded_encoder"]

Backend = TypeVar("Backend", bound=TorchBackend)


def base_backend(
    backend: str,
    args: str | Mapping[str, Any] = "",
    *,
    kind: Callable[..., Backend],
    what: str,
    device: str | None = None,
) -> Backend:
    """A model that answers nobody by itself: its store is off.

    Args:
        backend: its name in `medvlm models`.
        args: its --model_args.
        kind: the class it must be of, which may be an abstract one.
        what: the same in words.
        device: where it runs, unless `args` say.

    Raises:
        UserError: if there is none of that name, it is of another kind, or an option does not fit.
    """
    targets = plugin.model_targets()
    if backend not in targets:
        raise UserError(f"Unknown model {backend!r}.{near_matches(backend, targets)}")
    cls = plugin.load_target(targets[backend])
    if not issubclass(cls, cast(type, kind)):
        raise UserError(f"Expected {what}, but {backend} is a {cls.card.family}.")
    options = simple_parse_args_string(args) if isinstance(args, str) else dict(args)
    built: Backend = cls.create_from_arg_obj({**options, "store": "off"}, {"device": device})
    return built


def frozen_encoder(backend: str, args: str | Mapping[str, Any] = "", *, device: str | None = None) -> DualEncoder:
    """A dual encoder by its name and --model_args; see `base_backend`."""
    what = "the encoder to be a dual encoder"
    return base_backend(backend, args, kind=DualEncoder, what=what, device=device)


def encoder_record(encoder: TorchBackend, backend: str, args: str | Mapping[str, Any]) -> dict[str, Any]:
    """What finds this encoder again: backend, options with the path in full, and the hashes of its weights."""
    options = dict(simple_parse_args_string(args) if isinstance(args, str) else args)
    path = Path(str(options.get("pretrained", ""))).expanduser()
    if "pretrained" in options and path.exists():
        options["pretrained"] = str(path.resolve())
    return {"backend": backend, "args": options, "weights": dict(encoder.weights)}


def recorded_base(
    record: Mapping[str, Any],
    *,
    kind: Callable[..., Backend],
    what: str,
    pretrained: str | None = None,
    device: str | None = None,
) -> Backend:
    """The model of a record; its weights are compared by `check_weights`, once they are hashed.

    Args:
        record: as `encoder_record` made it.
        kind: see `base_backend`.
        what: see `base_backend`.
        pretrained: where it lies now, if not where it lay.
        device: where it runs.

    Raises:
        UserError: if it is not there.
    """
    moved = {} if pretrained is None else {"pretrained": pretrained}
    return base_backend(record["backend"], {**record["args"], **moved}, kind=kind, what=what, device=device)


def recorded_encoder(
    record: Mapping[str, Any], *, pretrained: str | None = None, device: str | None = None
) -> DualEncoder:
    """The dual encoder of a record; see `recorded_base`."""
    what = "the encoder to be a dual encoder"
    return recorded_base(record, kind=DualEncoder, what=what, pretrained=pretrained, device=device)
