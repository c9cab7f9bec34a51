from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from medvlm_harness.model_backends import identity
from medvlm_harness.model_backends.biomedclip import BiomedClipBackend
from medvlm_harness.model_backends.chexzero import CheXzeroBackend
from medvlm_harness.model_backends.identity import code_sha256, combined_sha256, library_versions, state_sha256
from medvlm_harness.model_backends.tiny import TinyBackend

PLUGIN = """
from medvlm_harness.model_backends.dual_encoder import DualEncoder

class Mine(DualEncoder):
    '''A backend of somebody else's.'''

    def encode_images(self, pixels):
        return pixels * {factor}  # {comment}
"""


def plugin(path: Path, factor: int, comment: str = "", name: str = "their_plugin") -> type:
    path.write_text(PLUGIN.format(factor=factor, comment=comment), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    found: type = module.Mine
    return found


def test_a_backend_whose_code_changes_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "their_plugin", sys)
    first = code_sha256(plugin(tmp_path / "a.py", 1))
    assert code_sha256(plugin(tmp_path / "a.py", 2)) != first
    assert code_sha256(plugin(tmp_path / "a.py", 1)) == first
    # Neither a comment nor the file's name decides an answer.
    assert code_sha256(plugin(tmp_path / "b.py", 1, comment="faster")) == first


def test_each_of_our_backends_has_code_of_its_own() -> None:
    hashes = {code_sha256(backend) for backend in (TinyBackend, CheXzeroBackend, BiomedClipBackend)}
    assert len(hashes) == 3


def test_the_code_includes_what_our_modules_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = code_sha256(CheXzeroBackend)
    source = identity._source
    changed = tmp_path / "images.py"
    original = source("medvlm_harness.data.images")
    assert original is not None
    changed.write_text(original.read_text(encoding="utf-8") + "\nFORMATS = ('PNG',)\n", encoding="utf-8")
    for name, differs in (("medvlm_harness.data.images", True), ("medvlm_harness.model_backends.cards", False)):
        monkeypatch.setattr(identity, "_source", lambda asked, name=name: changed if asked == name else source(asked))
        assert (code_sha256(CheXzeroBackend) != before) == differs, name


def test_a_state_is_its_names_types_shapes_and_values() -> None:
    def state(dtype: torch.dtype = torch.float32, value: float = 1.0, name: str = "a", size: int = 3) -> str:
        module = torch.nn.Module()
        module.register_buffer(name, torch.full((size,), value, dtype=dtype))
        module.register_buffer("scale", torch.tensor(2.0))
        return state_sha256(module)

    assert state() == state()
    assert len({state(), state(torch.bfloat16), state(value=1.0000001), state(name="b"), state(size=4)}) == 5


def test_versions_are_those_of_the_installed_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library_versions()["torch"] == torch.__version__.partition("+")[0]
    monkeypatch.setattr(identity, "LIBRARIES", ("no-such-library",))
    assert library_versions()["no-such-library"] is None


def test_the_order_of_weights_counts() -> None:
    assert combined_sha256(["a", "b"]) != combined_sha256(["b", "a"])
