"""A pickled checkpoint as safetensors, which holds numbers and nothing that runs."""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError, first_line
from medvlm_harness.model_backends.checkpoints import LOAD_ERRORS

__all__ = ["Conversion", "convert", "imported_by_pickle"]

_UNPICKLING_ERRORS = (*LOAD_ERRORS, ImportError)  # the second where the file's own code runs
_PICKLES_AT_MOST = 5  # torch's format before 1.6 holds as many, one after the other
# What a file of tensors alone imports.
_HARMLESS = ("torch._utils._rebuild_", "torch.storage.", "collections.OrderedDict")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion wrote."""

    target: Path
    sha256: str  # of the source
    tensors: int
    left_out: Mapping[str, str]  # what is no tensor, or lies beside the chosen key -> its type
    copied: tuple[str, ...]  # tensors that shared memory with another, and now have their own


def convert(source: Path, target: Path, *, key: str | None = None, trust_pickle: bool = False) -> Conversion:
    """Write the tensors of a .pt, .pth, .bin or .ckpt file to a new .safetensors file, and read it back.

    Args:
        source: a state dict, or a mapping that holds one.
        target: must not exist; appears whole or not at all.
        key: where in the mapping the state dict lies, such as "model" or "state_dict".
        trust_pickle: run the code in the file, if it needs any.

    Raises:
        UserError: if a file is not as above, or needs code that is not trusted.
    """
    if not source.is_file():
        raise UserError(f"Expected a checkpoint file, but {source} is not one.")
    if source.suffix == ".safetensors":
        raise UserError(f"{source} is safetensors already.")
    if target.suffix != ".safetensors":
        raise UserError(f"Expected the target to end in .safetensors, but got {target}.")
    _refuse_to_overwrite(target)
    sha256 = file_sha256(source)
    state, left_out = _state(source, _load(source, trust_pickle), key)
    tensors, copied = _plain(source, state)
    metadata = {"format": "pt", "source_name": source.name, "source_sha256": sha256, "source_key": key or ""}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        _verify(partial, tensors, metadata)
        _refuse_to_overwrite(target)
        partial.replace(target)
    except SafetensorError as error:
        raise UserError(f"{source} cannot be written as safetensors: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Conversion(target, sha256, len(tensors), left_out, copied)


def imported_by_pickle(path: Path) -> tuple[str, ...]:
    """What unpickling the file would import and may call, by reading its instructions without following any."""
    found: dict[str, None] = {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        with archive.open(name) as file:
                            found |= dict.fromkeys(_imports(file))
        else:
            with path.open("rb") as file:
                for _ in range(_PICKLES_AT_MOST):
                    found |= dict.fromkeys(_imports(file))
    except (ValueError, EOFError, OSError, zipfile.BadZipFile):
        pass  # behind the pickles come the numbers
    return tuple(found)


def _imports(file: IO[bytes]) -> Iterator[str]:
    texts: list[str] = []  # the last ones, which STACK_GLOBAL takes
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif isinstance(argument, str):
            texts.append(argument)


def _load(source: Path, trust_pickle: bool) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except _UNPICKLING_ERRORS as error:
        imports = [name for name in imported_by_pickle(source) if not name.startswith(_HARMLESS)]
        if not imports:  # no question of trust
            raise UserError(f"{source} cannot be read as a checkpoint: {first_line(error)}") from error
        if not trust_pickle:
            raise UserError(
                f"{source} is a pickle that runs code when it is read (it calls on {_some(imports)}), and whoever "
                "made it may have put in any command, with your rights: if you trust its maker, add --trust-pickle."
            ) from error
    try:
        return torch.load(source, map_location="cpu", weights_only=False)
    except _UNPICKLING_ERRORS as error:
        raise UserError(
            f"{source} cannot be unpickled here: {first_line(error)} "
            "It may need the package that it was saved with, which must be installed for this step."
        ) from error


def _state(source: Path, loaded: Any, key: str | None) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The mapping that holds the tensors, and what is left out of the file."""
    loaded = _unwrapped(loaded)
    if not isinstance(loaded, Mapping):
        raise UserError(f"Expected {source} to hold a mapping of names to tensors, but got {_kind(loaded)}.")
    beside: dict[str, str] = {}
    if key is not None:
        if key not in loaded:
            raise UserError(f"{source} has no key {key!r}: it has {_some(list(map(str, loaded)))}.")
        beside = {str(name): _kind(value) for name, value in loaded.items() if name != key}
        loaded = _unwrapped(loaded[key])
    inner = loaded if isinstance(loaded, Mapping) else {}
    if not any(isinstance(value, torch.Tensor) for value in inner.values()):
        nested = [str(name) for name, value in inner.items() if _holds_tensors(value)]
        where = f"under {key!r} of {source}" if key else f"at the top of {source}"
        mend = f": name where they are by --key, one of {', '.join(nested)}" if nested and not key else ""
        raise UserError(f"There are no tensors {where}{mend}.")
    prefix = f"{key}." if key else ""
    others = {f"{prefix}{n}": _kind(v) for n, v in inner.items() if not isinstance(v, torch.Tensor)}
    return {str(n): v for n, v in inner.items() if isinstance(v, torch.Tensor)}, {**beside, **others}


def _unwrapped(value: Any) -> Any:
    return value.state_dict() if isinstance(value, torch.nn.Module) else value


def _holds_tensors(value: Any) -> bool:
    inner = _unwrapped(value)
    return isinstance(inner, Mapping) and any(isinstance(one, torch.Tensor) for one in inner.values())


def _plain(source: Path, state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Dense tensors with memory of their own: safetensors knows no sharing, and loaders want every name."""
    seen: set[int] = set()
    tensors, copied = {}, []
    for name, value in state.items():
        tensor = value.detach()
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{source}: {name} is sparse or quantised, which safetensors cannot hold.")
        place = tensor.untyped_storage().data_ptr()
        if tensor.numel() and place in seen:
            tensor = tensor.clone()
            copied.append(name)
        seen.add(place)
        tensors[name] = tensor.contiguous()
    return tensors, tuple(copied)


def _verify(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Read back every byte.

    Raises:
        UserError: if the file holds anything else than what was given.
    """
    with safe_open(path, "pt") as file:
        same = set(file.keys()) == set(tensors) and file.metadata() == metadata
        for name, tensor in tensors.items() if same else ():
            read = file.get_tensor(name)
            same &= read.dtype == tensor.dtype and read.shape == tensor.shape and _bytes(read).equal(_bytes(tensor))
    if not same:
        raise UserError(f"{path} does not read back as it was written: is the disk full or damaged?")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def _refuse_to_overwrite(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} exists already, and is not overwritten.")


def _kind(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
