from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest

from medvlm_harness import plugin
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.requests import Capability
from medvlm_harness.tracks.declarations import TRACKS

TARGETS = plugin.model_targets()
DECLARED: dict[str, dict[str, str]] = tomllib.loads(
    (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
)["project"]["entry-points"]


def backend(name: str) -> Any:
    module, _, attribute = TARGETS[name].partition(":")
    return getattr(import_module(module), attribute)


def test_the_registry_is_what_pyproject_declares() -> None:
    assert DECLARED["lm_eval.models"] == TARGETS
    assert len(TARGETS) >= 5


def test_lm_evals_registry_builds_each_by_its_name() -> None:
    plugin.install()
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import get_model

    assert {name: get_model(name) for name in TARGETS} == {name: backend(name) for name in TARGETS}
    assert get_model("hf").__name__ == "HFLM"  # lm-eval's own are still there


@pytest.mark.parametrize("name", TARGETS)
def test_each_model_is_complete(name: str) -> None:
    cls = backend(name)
    assert issubclass(cls, MedicalLM)
    card: ModelCard = cls.card
    assert card.name == name
    assert card.family in get_args(ModelCard.__annotations__["family"]) or card.family
    assert card.summary and "\n" not in card.summary
    assert card.licence is None or card.licence.strip()
    assert card.parameters is None or card.parameters >= 0
    assert cls.CAPABILITIES
    assert set(get_args(Capability)) >= cls.CAPABILITIES
    assert cls.__doc__


@pytest.mark.parametrize("name", TARGETS)
def test_each_capability_is_implemented(name: str) -> None:
    cls = backend(name)
    for capability in cls.CAPABILITIES:
        method = capability.partition(":")[0]
        assert getattr(cls, method) is not getattr(MedicalLM, method)


@pytest.mark.parametrize("name", TARGETS)
def test_no_revision_or_hash_is_invented(name: str) -> None:
    # Nobody gave us one: the first card that pins a checkpoint adds its name here, with where the hash was read.
    pinned: set[str] = set()
    found = re.findall(r"\b(?:[0-9a-f]{40}|[0-9a-f]{64})\b", str(backend(name).card))
    assert bool(found) == (name in pinned)


@pytest.mark.parametrize("name", TARGETS)
def test_no_option_shares_a_name_with_a_key_of_metadata(name: str) -> None:
    # lm-eval merges a model's arguments into each task's metadata.
    for track, module in TRACKS.items():
        runtime_keys = getattr(import_module(module), track).RUNTIME_KEYS
        assert not backend(name).options() & (runtime_keys | {"version"})


@pytest.mark.parametrize("name", TARGETS)
def test_published_prompts_have_a_source_and_a_place_for_the_label(name: str) -> None:
    prompts = backend(name).card.prompts
    if prompts is not None:
        assert prompts.source and prompts.licence
        assert all(template.count("{}") == 1 for template in (*prompts.positive, *prompts.negative))
