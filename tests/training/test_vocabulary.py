from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from medvlm_harness.data.records import Dataset, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.tokenizer_files import load_tokenizer
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.vocabulary import train_vocabulary, write_vocabulary


@pytest.fixture(scope="module")
def data(demo: Dataset) -> TrainingData:
    return TrainingData.of(demo)


def test_the_same_reports_give_the_same_vocabulary_byte_for_byte(data: TrainingData) -> None:
    one, two = (train_vocabulary(data, 400) for _ in range(2))
    assert one.tokenizer.to_str() == two.tokenizer.to_str()
    assert one.size == 400
    assert train_vocabulary(data, 100_000).size < 100_000  # the reports have no more pairs


def test_only_the_train_split_is_learnt_from(demo: Dataset) -> None:
    def marked(split: str) -> set[str]:
        said = "zzyzx " * 20
        studies = tuple(replace(s, findings=said) if s.split == split else s for s in demo.studies)
        data = TrainingData.of(replace(demo, studies=studies))
        return set(train_vocabulary(data, 1000).tokenizer.get_vocab())

    assert "Ġzzyzx" in marked("train")
    assert not {"Ġzzyzx"} & (marked("validation") | marked("test"))


def test_a_text_comes_back_and_ends_with_its_end(data: TrainingData, tmp_path: Path) -> None:
    write_vocabulary(train_vocabulary(data, 400), data, tmp_path / "cased")
    write_vocabulary(train_vocabulary(data, 400, lowercase=True), data, tmp_path / "uncased")
    text = "The Heart is XXXX, naïve ☃."
    for name, wanted in (("cased", text), ("uncased", text.lower())):
        tokenizer = load_tokenizer(str(tmp_path / name))
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == wanted
    card = yaml.safe_load((tmp_path / "cased" / "medvlm_card.yaml").read_text())
    assert card["trained_on"] == [data.trained_on()]
    assert card["training"]["data"]["sha256"] == data.sha256
    with pytest.raises(UserError, match="exists already"):
        write_vocabulary(train_vocabulary(data, 400), data, tmp_path / "cased")


def test_a_pair_that_is_rare_is_not_merged(data: TrainingData) -> None:
    assert train_vocabulary(data, 100_000, min_frequency=50).size < train_vocabulary(data, 100_000).size


@pytest.mark.parametrize(("options", "expected"), [({"size": 257}, "258 or more"), ({"min_frequency": 0}, "1 or more")])
def test_wrong_options_get_one_line(data: TrainingData, options: dict[str, int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        train_vocabulary(data, **{"size": 400, **options})


def test_a_train_split_without_a_text_is_refused(demo: Dataset) -> None:
    silent = tuple(replace(study, findings="", impression="") for study in read_dataset(demo.folder).studies)
    with pytest.raises(UserError, match="no train study has findings or an impression"):
        train_vocabulary(TrainingData.of(replace(demo, studies=silent)), 400)
