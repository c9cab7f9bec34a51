"""A dual encoder as the frozen part of another model: built by its name, written down with its hashes, found again."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lm_eval.utils import simple_parse_args_string

from medvlm_harness import plugin
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.model_backends.dual_encoder import DualEncoder

__all__ = ["check_weights", "encoder_record", "frozen_encoder", "recorded_encoder"]


def frozen_encoder(backend: str, args: str | Mapping[str, Any] = "", *, device: str | None = None) -> DualEncoder:
    """A dual encoder that answers nobody by itself: its store is off.

    Args:
        backend: its name in `medvlm models`.
        args: its --model_args.
        device: where it runs, unless `args` say.

    Raises:
        UserError: if there is none of that name, it is no dual encoder, or an option does not fit.
    """
    targets = plugin.model_targets()
    if backend not in targets:
        raise UserError(f"Unknown model {backend!r}.{near_matches(backend, targets)}")
    module, _, attribute = targets[backend].partition(":")
    cls = getattr(import_module(module), attribute)
    if not issubclass(cls, DualEncoder):
        raise UserError(f"Expected the encoder to be a dual encoder, but {backend} is a {cls.card.family}.")
    options = simple_parse_args_string(args) if isinstance(args, str) else dict(args)
    built: DualEncoder = cls.create_from_arg_obj({**options, "store": "off"}, {"device": device})
    return built


def encoder_record(encoder: DualEncoder, backend: str, args: str | Mapping[str, Any]) -> dict[str, Any]:
    """What finds this encoder again: backend, options with the path in full, and the hashes of its weights."""
    options = dict(simple_parse_args_string(args) if isinstance(args, str) else args)
    path = Path(str(options.get("pretrained", ""))).expanduser()
    if "pretrained" in options and path.exists():
        options["pretrained"] = str(path.resolve())
    return {"backend": backend, "args": options, "weights": dict(encoder.weights)}


def recorded_encoder(
    record: Mapping[str, Any], *, pretrained: str | None = None, device: str | None = None
) -> DualEncoder:
    """The encoder of a record; its weights are compared by `check_weights`, once they are hashed.

    Args:
        record: as `encoder_record` made it.
        pretrained: where it lies now, if not where it lay.
        device: where it runs.

    Raises:
        UserError: if it is not there.
    """
    moved = {} if pretrained is None else {"pretrained": pretrained}
    return frozen_encoder(record["backend"], {**record["args"], **moved}, device=device)


def check_weights(what: str, recorded: Mapping[str, str], found: Mapping[str, str], *, option: str) -> None:
    """Refuse base weights that are not those that were trained on; files may have been renamed.

    Args:
        what: what they are, for people.
        recorded: file -> sha256 when it was trained.
        found: the same, now.
        option: by which the right ones are named.

    Raises:
        UserError: naming the first that differs.
    """
    if sorted(recorded.values()) != sorted(found.values()):
        known = set(recorded.values())
        name, value = next(((n, v) for n, v in found.items() if v not in known), ("no file", ""))
        raise UserError(
            f"{what} is not the one that this was trained on: {name} has sha256 {value[:12]}, expected "
            f"{' or '.join(v[:12] for v in recorded.values())}. Name the right one by {option}=..."
        )
