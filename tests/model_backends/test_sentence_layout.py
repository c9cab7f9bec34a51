from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.sentence_layout import SentenceLayout, read_layout, vocabulary_is_cased

OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules."
MEAN = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def write(folder: Path, *kinds: str, pooling: Any = None, base: str = OLD, **files: Any) -> Path:
    modules = [
        {"idx": k, "path": "" if kind == "Transformer" else f"{k}_{kind}", "type": base + kind}
        for k, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for k, kind in enumerate(kinds):
        if kind == "Pooling":
            (folder / f"{k}_Pooling").mkdir()
            (folder / f"{k}_Pooling" / "config.json").write_text(json.dumps(pooling or MEAN))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_that_says_nothing_is_pooled_by_the_mean(tmp_path: Path) -> None:
    assert read_layout(tmp_path) == SentenceLayout("mean", None, "", False)


@pytest.mark.parametrize("base", [OLD, NEW])
@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (MEAN, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_the_folders_own(tmp_path: Path, base: str, pooling: dict[str, Any], expected: str) -> None:
    assert read_layout(write(tmp_path, "Transformer", "Pooling", "Normalize", pooling=pooling, base=base)).pooling == (
        expected
    )


def test_length_case_and_words_before_a_text_are_read(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "query"}
    sentences = {"max_seq_length": 256, "do_lower_case": True}
    folder = write(
        tmp_path, "Transformer", "Pooling", sentence_bert_config=sentences, config_sentence_transformers=prompts
    )
    assert read_layout(folder) == SentenceLayout("mean", 256, "query: ", True)


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (("Transformer", "Pooling", "Dense"), None, "pass through a Dense, not done here"),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "got max_tokens"),
        (("Transformer", "Pooling"), {**MEAN, "pooling_mode_cls_token": True}, "got cls_token and mean_tokens"),
        (("Transformer", "Pooling"), [], "expected JSON's object"),
    ],
)
def test_vectors_that_would_be_others_are_refused(
    tmp_path: Path, kinds: tuple[str, ...], pooling: Any, message: str
) -> None:
    folder = write(tmp_path, *kinds, pooling=pooling)
    if pooling == []:
        (folder / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=message):
        read_layout(folder)


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    modules = [{"type": f"{OLD}Pooling", "path": "../elsewhere"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="lies outside the folder"):
        read_layout(tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["[PAD]", "[CLS]", "the", "heart", "##s"], False), (["[PAD]", "The", "the", "Heart", "##s"], True)],
)
def test_a_vocabulary_is_cased_if_its_words_have_capitals(tmp_path: Path, words: list[str], expected: bool) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*words, *[f"word{k}" for k in range(20)], ""]))
    assert vocabulary_is_cased(path) is expected
