from __future__ import annotations

import argparse
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends import convert as module
from medvlm_harness.model_backends.convert import convert, imported_by_pickle

ONE, TWO = torch.arange(6.0).reshape(2, 3), torch.tensor([float("nan"), 1.5], dtype=torch.float16)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_names_and_the_sources_hash_are_kept(tmp_path: Path, zipped: bool) -> None:
    source = save(
        tmp_path / "a.pth", {"one": ONE, "two": TWO, "n": torch.tensor(3)}, _use_new_zipfile_serialization=zipped
    )
    done = convert(source, tmp_path / "new" / "a.safetensors")
    written = load_file(done.target)
    assert written.keys() == {"one", "two", "n"}
    assert equal(written["one"], ONE) and equal(written["two"], TWO) and written["n"].item() == 3
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    with safe_open(done.target, "pt") as file:
        assert file.metadata() == {"format": "pt", "source_name": "a.pth", "source_sha256": sha256, "source_key": ""}
    assert (done.sha256, done.tensors, done.left_out, done.copied) == (sha256, 3, {}, ())
    assert list(done.target.parent.iterdir()) == [done.target]


def test_shared_and_strided_tensors_get_memory_of_their_own(tmp_path: Path) -> None:
    state = {"a": ONE, "tied": ONE, "row": ONE[1], "turned": torch.rand(3, 4).T, "empty": torch.zeros(0)}
    done = convert(save(tmp_path / "a.pt", state), tmp_path / "a.safetensors")
    assert done.copied == ("tied", "row")
    written = load_file(done.target)
    assert all(equal(written[name], tensor) for name, tensor in state.items())


def test_the_weights_may_lie_under_a_key_and_the_rest_is_named(tmp_path: Path) -> None:
    content = {"model": {"w": ONE, "version": 2}, "optimizer": {"lr": 0.1}, "epoch": 3}
    source = save(tmp_path / "a.ckpt", content)
    done = convert(source, tmp_path / "a.safetensors", key="model")
    assert load_file(done.target).keys() == {"w"}
    assert done.left_out == {"optimizer": "dict", "epoch": "int", "model.version": "int"}
    with pytest.raises(UserError, match=r"no tensors at the top of .*name where they are by --key, one of model\."):
        convert(source, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="has no key 'network': it has model, optimizer, epoch"):
        convert(source, tmp_path / "b.safetensors", key="network")
    with pytest.raises(UserError, match="no tensors under 'epoch'"):
        convert(source, tmp_path / "b.safetensors", key="epoch")


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    done = convert(save(tmp_path / "a.pt", {"w": ONE, "note": "hello", "steps": 3}), tmp_path / "a.safetensors")
    assert done.left_out == {"note": "str", "steps": "int"}


# --- pickles with code


@pytest.mark.parametrize("zipped", [True, False, None])
def test_a_pickle_with_code_is_refused_and_never_run(
    tmp_path: Path, zipped: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not matter
    source, executed, target = tmp_path / "bomb.pt", tmp_path / "executed", tmp_path / "a.safetensors"
    content = {"w": ONE, "x": Bomb(executed)}
    if zipped is None:
        source.write_bytes(pickle.dumps(content, protocol=2))
    else:
        save(source, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"runs code when it is read \(it calls on .*posix\.mkdir.*--trust-pickle"
    ) as error:
        convert(source, target)
    assert "\n" not in str(error.value)
    assert not executed.exists() and not target.exists()
    if zipped is not None:  # negative control: it is live
        convert(source, target, trust_pickle=True)
        assert executed.is_dir()
        assert load_file(target).keys() == {"w"}


def test_a_configuration_object_needs_trust_and_is_left_out(tmp_path: Path) -> None:
    content = {"state_dict": {"w": ONE}, "hyper_parameters": argparse.Namespace(lr=1)}
    source = save(tmp_path / "lightning.ckpt", content)
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        convert(source, tmp_path / "a.safetensors", key="state_dict")
    done = convert(source, tmp_path / "a.safetensors", key="state_dict", trust_pickle=True)
    assert done.left_out == {"hyper_parameters": "Namespace"}
    assert equal(load_file(done.target)["w"], ONE)


def test_a_whole_module_gives_its_state(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 2)
    source = save(tmp_path / "a.pt", linear)
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear"):
        convert(source, tmp_path / "a.safetensors")
    convert(source, tmp_path / "a.safetensors", trust_pickle=True)
    assert equal(load_file(tmp_path / "a.safetensors")["weight"], linear.weight.detach())


def test_a_package_that_is_not_here_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.pt"
    source.write_bytes(b"\x80\x02cno_such_package\nConfig\nq\x00)\x81q\x01.")
    with pytest.raises(UserError, match=r"no_such_package\.Config.*--trust-pickle"):
        convert(source, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"cannot be unpickled here: .*needs? the package"):
        convert(source, tmp_path / "a.safetensors", trust_pickle=True)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_what_a_pickle_imports_is_read_without_running_it(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"x": Bomb(tmp_path / "executed"), "y": argparse.Namespace()}, protocol=protocol))
    assert {"posix.mkdir", "argparse.Namespace"} <= set(imported_by_pickle(path))
    assert not (tmp_path / "executed").exists()


# --- files


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 damaged"])
def test_a_file_that_is_none_is_refused_whether_trusted_or_not(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    for trusted in (False, True):
        with pytest.raises(UserError, match=r"a\.pt cannot be read as a checkpoint") as error:
            convert(tmp_path / "a.pt", tmp_path / "a.safetensors", trust_pickle=trusted)
        assert "--trust-pickle" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("none.pt", "a.safetensors", "Expected a checkpoint file"),
        ("b.safetensors", "a.safetensors", "is safetensors already"),
        ("a.pt", "a.bin", "to end in .safetensors"),
        ("a.pt", "b.safetensors", "exists already, and is not overwritten"),
    ],
)
def test_wrong_names_are_refused(tmp_path: Path, source: str, target: str, message: str) -> None:
    save(tmp_path / "a.pt", {"w": ONE})
    (tmp_path / "b.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / source, tmp_path / target)
    assert (tmp_path / "b.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("content", [[ONE], ONE, {"a": ONE.to_sparse()}, {}, {"a": 1}])
def test_what_holds_no_dense_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match=r"a\.pt"):
        convert(save(tmp_path / "a.pt", content), tmp_path / "a.safetensors")


def test_a_file_that_does_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module.save_file

    def damaged(tensors: Any, path: Path, **options: Any) -> None:
        write(tensors, path, **options)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(module, "save_file", damaged)
    with pytest.raises(UserError, match="does not read back"):
        convert(save(tmp_path / "a.pt", {"w": ONE}), tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
