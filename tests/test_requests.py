from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvlm_harness.data.images import open_image, open_reference
from medvlm_harness.errors import UserError
from medvlm_harness.perturbations.image import Case, corruptions_of, find_corruption
from medvlm_harness.requests import (
    Embedding,
    Generation,
    ImageRef,
    Label,
    LabelScores,
    LabelSet,
    PromptWithFloors,
    TextRef,
)

SHA = "ab" * 32


# --- references


def test_an_image_is_its_hash_with_the_path_beside_it() -> None:
    ref = ImageRef(SHA, Path("/data/private/patient_7.png"))
    assert ref == SHA
    assert (len(ref), hash(ref)) == (64, hash(SHA))
    assert json.dumps([ref]) == json.dumps([SHA])
    assert "patient" not in f"{ref!s} {ref!r} {json.dumps(ref)}"


def test_a_text_is_its_hash_with_the_text_beside_it() -> None:
    ref = TextRef("No acute disease. Größe 5 cm.")
    assert ref == hashlib.sha256("No acute disease. Größe 5 cm.".encode()).hexdigest()
    assert ref.text == "No acute disease. Größe 5 cm."
    assert "acute" not in f"{ref!s} {ref!r} {json.dumps(ref)}"


@pytest.mark.parametrize("ref", [ImageRef(SHA, Path("a.png")), TextRef("report")])
def test_references_survive_pickling_and_hold_nothing_else(ref: Any) -> None:
    copy = pickle.loads(pickle.dumps(ref))  # noqa: S301
    assert copy == ref and type(copy) is type(ref)
    assert getattr(copy, "path", None) == getattr(ref, "path", None)
    assert getattr(copy, "text", None) == getattr(ref, "text", None)
    assert len(pickle.dumps(ref)) < 250


def test_a_perturbed_image_is_another_one_of_the_same_file(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    path = write_image(tmp_path / "a.png", size=(40, 32))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    cases = [
        Case(find_corruption(name, "chest"), severity, seed)
        for name, severity, seed in (("gaussian_noise", 1, 0), ("gaussian_noise", 2, 0), ("gaussian_noise", 1, 1))
    ]
    clean, refs = ImageRef(sha, path), [ImageRef(sha, path, case) for case in cases]
    assert clean == sha and clean.perturbation is None
    assert len({str(clean), *map(str, refs)}) == 4
    assert {ref.file_sha256 for ref in (clean, *refs)} == {sha}
    assert json.dumps([refs[0]]) == json.dumps([str(refs[0])]) and len(refs[0]) == 64
    picture = open_image(path)
    assert open_reference(clean).tobytes() == picture.tobytes()
    pixels = [open_reference(ref).tobytes() for ref in refs]
    assert pixels == [case(picture, key=sha).tobytes() for case in cases]
    assert len({picture.tobytes(), *pixels}) == 4
    path.write_bytes(write_image(tmp_path / "b.png", seed=1).read_bytes())
    with pytest.raises(UserError, match="changed since it was prepared"):
        open_reference(refs[0])


def test_a_perturbed_image_is_the_same_in_another_process(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    path = write_image(tmp_path / "a.png", size=(40, 32))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    refs = [ImageRef(sha, path, Case(corruption, corruption.severities[-1])) for corruption in corruptions_of("chest")]
    code = (
        "import hashlib, pickle, sys\n"
        "from medvlm_harness.data.images import open_reference\n"
        "for ref in pickle.load(sys.stdin.buffer):\n"
        "    print(ref, hashlib.sha256(open_reference(ref).tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(refs), capture_output=True, check=True)
    here = [f"{ref} {hashlib.sha256(open_reference(ref).tobytes()).hexdigest()}" for ref in refs]
    assert done.stdout.decode().splitlines() == here


# --- responses


def test_an_embedding_prints_as_an_id_of_its_bytes() -> None:
    vector = np.arange(512, dtype=np.float32)
    one, same, other = Embedding(vector), Embedding(vector.copy(), True), Embedding(vector + 1)
    assert str(one) == str(same) != str(other)
    assert len(str(one)) < 30
    assert "," not in str(one)


def test_label_scores_are_plain_tuples() -> None:
    scores = LabelScores((0.5, -0.5), (0.6, 0.4))
    assert json.loads(json.dumps(scores)) == [[0.5, -0.5], [0.6, 0.4]]


# --- label sets


def test_a_list_of_names_means_the_name_against_no_and_a_question() -> None:
    labels = LabelSet.from_config("t", ["Pleural Effusion", "lung_opacity"])
    assert labels.kind == "multilabel"
    assert labels.labels[0] == Label(
        "Pleural Effusion", ("pleural effusion",), ("no pleural effusion",), "Is there pleural effusion?"
    )
    assert labels.labels[1].positive == ("lung opacity",)
    assert [label.key for label in labels.labels] == ["pleural_effusion", "lung_opacity"]


def test_a_mapping_may_say_each_phrase_or_leave_it_out() -> None:
    labels = LabelSet.from_config(
        "t", {"Edema": {"positive": ["edema", "wet"], "question": "Wet?"}, "Mass": {"negative": "clear"}}
    )
    assert labels.labels[0] == Label("Edema", ("edema", "wet"), ("no edema",), "Wet?")
    assert labels.labels[1] == Label("Mass", ("mass",), ("clear",), "Is there mass?")


def test_options_are_exclusive_and_have_no_negatives() -> None:
    labels = LabelSet.from_config("t", {"kind": "multiclass", "options": {0: "none", "1": ["mild", "some"]}})
    assert labels.kind == "multiclass"
    assert labels.names == ("0", "1")
    assert labels.labels[1] == Label("1", ("mild", "some"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "Expected labels of t to be a list of names or a mapping"),
        ("Edema", "list of names"),
        ([], "list of names"),
        ({}, "list of names"),
        (["Edema", "Edema"], "each label of t once"),
        ({"Edema": ["edema"]}, "label 'Edema' of t to be a mapping"),
        ({"Edema": {"positiv": ["x"]}}, r"'positiv' in label 'Edema' of t\. Did you mean positive\?"),
        ({"Edema": {"positive": []}}, r"phrases for t: Edema\.positive"),
        ({"Edema": {"positive": [" "]}}, r"phrases for t: Edema\.positive"),
        ({"Edema": {"negative": [1]}}, r"phrases for t: Edema\.negative"),
        ({"kind": "multiclass"}, r"labels\.options of t"),
        ({"kind": "multiclass", "options": {"a": "x"}}, "two or more"),
        ({"kind": "multiclass", "options": ["a", "b"]}, "two or more"),
        ({"kind": "multiclass", "options": {"a": "x", "b": ""}}, "phrases for t: b"),
        ({"kind": "multiclass", "option": {}}, r"'option'.* Did you mean options\?"),
        ({"kind": "multilabel", "Edema": {}}, "kind"),
    ],
)
def test_what_is_no_label_set_is_refused(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        LabelSet.from_config("t", config)
    assert "\n" not in str(error.value)


def test_identity_is_what_a_model_sees() -> None:
    base = LabelSet.from_config("t", ["Edema", "Mass"])
    assert str(base).startswith("t@") and len(str(base)) == 14
    other_prior = LabelSet(base.name, base.kind, base.labels, (0.1, 0.2))
    assert other_prior == base and str(other_prior) == str(base)
    changed = [
        LabelSet.from_config("t", ["Mass", "Edema"]),
        LabelSet.from_config("t", ["Edema"]),
        LabelSet.from_config("t", {"Edema": {"question": "?"}, "Mass": {}}),
        LabelSet.from_config("t", {"Edema": {"negative": "dry"}, "Mass": {}}),
        LabelSet(base.name, "multiclass", base.labels),
    ]
    assert len({base.sha256, *(labels.sha256 for labels in changed)}) == 6


def test_identity_is_the_same_in_every_process() -> None:
    code = "from medvlm_harness.requests import LabelSet; print(LabelSet.from_config('t', ['Edema']))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert printed == {str(LabelSet.from_config("t", ["Edema"]))}


def test_a_label_set_survives_pickling() -> None:
    labels = LabelSet.from_config("t", ["Edema"])
    assert pickle.loads(pickle.dumps(labels)) == labels  # noqa: S301


def test_a_generation_is_its_text_with_whether_it_ended_beside_it() -> None:
    text = Generation("no effusion", finished=False)
    assert text == "no effusion" and json.dumps(text) == '"no effusion"'
    copy = pickle.loads(pickle.dumps(text))  # noqa: S301  # our own
    assert (copy, copy.finished) == (text, False)
    assert type(text)("a reference").finished is None  # as lm-eval casts what is compared with it


def test_a_model_sees_a_prompt_without_its_floors() -> None:
    prompt = PromptWithFloors("Summarise: large heart.", {"constant": "No acute disease."})
    assert json.dumps(prompt) == '"Summarise: large heart."' and str(prompt) == "Summarise: large heart."
    copy = pickle.loads(pickle.dumps(prompt))  # noqa: S301  # our own
    assert (copy, copy.floors) == (prompt, prompt.floors)
