from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.tokenization import cut_words
from medvlm_harness.model_backends.tokenizer_files import load_tokenizer, report_tokenizer

TEXTS = ["Heart-size  is XXXX.\nNo pneumothorax; 3.5 cm", "<b>naïve</b> café &amp; 5°", ""]


@pytest.fixture
def word_level(tmp_path: Path) -> Path:
    """A tokenizer.json that knows two words, and cuts and pads by itself."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "no": 1, "effusion": 2}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8, pad_token="[UNK]")  # noqa: S106
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_file_is_asked_without_its_own_truncation_and_padding(word_level: Path) -> None:
    tokenizer = report_tokenizer(str(word_level))
    ((_, spans, unknown),) = tokenizer.encode(["no big effusion here"])
    assert spans.tolist() == [[0, 2], [3, 6], [7, 15], [16, 20]]
    assert unknown.tolist() == [False, True, False, True]
    assert (tokenizer.vocabulary, tokenizer.special, tokenizer.knows_bytes) == (3, 0, False)
    assert tokenizer.pieces("no cat") == ["no", "[UNK]"]


def test_open_clips_own_pieces_are_placed_where_they_stand() -> None:
    tokenizer = report_tokenizer("open_clip:ViT-B-32")
    import open_clip

    own = open_clip.get_tokenizer("ViT-B-32")
    for text, encoded in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert len(encoded.spans) == len(own.encode(text)) == len(tokenizer.pieces(text))
        for (start, end), token in zip(encoded.spans.tolist(), own.encode(text), strict=True):
            said = own.decode([token]).strip()
            assert encoded.text[start:end] == said or "\ufffd" in said  # a byte alone is no letter
        assert not cut_words(encoded).unknown.any()
    assert tokenizer.vocabulary == 49408
    assert tokenizer.knows_bytes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("open_clip:ViT-B-33", "open_clip knows no model 'ViT-B-33'. Did you mean"),
        ("{tmp}/vocab.txt", "but got the file vocab.txt"),
        ("{tmp}/broken.json", "Cannot load a tokenizer from"),
        ("{tmp}", "Cannot load a tokenizer from"),
        ("./missing", "but got ./missing"),
    ],
)
def test_what_is_no_tokenizer_gets_one_line(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "vocab.txt").write_text("no")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        report_tokenizer(name.format(tmp=tmp_path))
    assert expected in str(error.value)


def test_loading_runs_no_code_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}, "tokenizer_class": "Mine"}'
    )
    (tmp_path / "mine.py").write_text("raise RuntimeError('it was run')")
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert "it was run" not in str(error.value)
