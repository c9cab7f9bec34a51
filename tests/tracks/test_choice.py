from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.task import MultipleChoiceTask
from scipy.stats import binomtest

from medvlm_harness.data.records import Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.base import make_labeler
from medvlm_harness.metrics.choice import same_words
from medvlm_harness.requests import Embedding
from medvlm_harness.tracks.choice import ImpressionChoice

NORMAL = ("No acute disease.", "No acute disease", "Normal chest.", "Clear lungs.", "Unremarkable chest x-ray.")
ABNORMAL = (
    *("Cardiomegaly.", "Enlarged heart.", "The heart is enlarged.", "Mild cardiomegaly."),
    *("Pleural effusion.", "Small pleural effusion.", "Bilateral effusions.", "Left effusion."),
    *("Pulmonary edema.", "Pneumothorax.", "Pneumonia.", "Possible pneumonia.", "Rib fracture.", "Atelectasis."),
)
PROMPT = "Findings: {findings}\nImpression:"


def study(k: int, impression: str, split: str, **more: Any) -> Study:
    normal = impression in NORMAL
    labels = {"mesh": {"No Finding": int(normal)}}
    return Study(
        f"s{k:03}",
        f"p{k}",
        **{"findings": f"{impression} Seen {k}.", "labels": labels, **more},
        impression=impression,
        split=split,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(2)
    texts = [str(rng.choice(NORMAL if rng.random() < 0.6 else ABNORMAL)) for _ in range(160)]
    studies = [study(k, text, "test" if k < 100 else "train") for k, text in enumerate(texts)]
    studies += [study(200, "Edema.", "test", findings=" "), study(201, " ", "test"), study(202, " . ", "test")]
    return write_set(tmp_path_factory.mktemp("choice") / "set", studies)


def task(folder: Path, distractors: str = "other_labels", **config: Any) -> ImpressionChoice:
    given = {"task": "c", "dataset": "synthetic", "prompt": PROMPT, "distractors": distractors, **config}
    return ImpressionChoice({**given, "metadata": {"data_dir": str(folder)}})


def by(value: Callable[[str, str], float]) -> Callable[[Sequence[Instance]], list[tuple[float, bool]]]:
    """A model whose log-likelihood is a function of prompt and continuation."""
    return lambda requests: [(value(*request.arguments), False) for request in requests]


def noise(context: str, option: str) -> float:
    return -float(np.random.default_rng(crc32(f"{len(context)}{option}".encode())).random() * len(option))


LABELER = cache(partial(make_labeler, "rules"))


@cache
def label_set(text: str) -> frozenset[str]:
    return frozenset(name for name, value in LABELER().label(text).items() if value in (1, -1))


@pytest.mark.parametrize("distractors", ["other_labels", "same_labels"])
def test_options_are_the_own_impression_and_three_of_the_split_with_other_words(folder: Path, distractors: str) -> None:
    test = {s.study_id: s for s in read_dataset(folder).studies if s.split == "test"}
    written = {s.impression for s in test.values()}
    documents = task(folder, distractors).test_docs()
    assert len(documents) > 40
    for doc in documents:
        assert len(doc["choices"]) == 4 == len({same_words(text) for text in doc["choices"]})
        assert doc["choices"][doc["target"]] == test[doc["study_id"]].impression
        assert set(doc["choices"]) <= written


def test_other_labels_are_four_different_sets_and_same_labels_are_one(folder: Path) -> None:
    for doc in task(folder).test_docs():
        assert len({label_set(text) for text in doc["choices"]}) == 4
    for doc in task(folder, "same_labels").test_docs():
        assert len({label_set(text) for text in doc["choices"]}) == 1


def test_a_study_without_three_distractors_is_left_out_and_counted(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder, "same_labels"), by(noise))
    studies = [s for s in read_dataset(folder).studies if s.split == "test" and s.findings.strip()]
    texts = {same_words(s.impression): s.impression for s in studies if same_words(s.impression)}
    enough = [
        s.study_id
        for s in studies
        if same_words(s.impression) and sum(label_set(t) == label_set(s.impression) for t in texts.values()) >= 4
    ]
    assert [d["study_id"] for d in result.documents] == enough
    counts = result.details["counts"]
    assert (counts["studies_without_findings"], counts["studies_without_impression"]) == (1, 1)
    assert counts["studies_without_distractors"] == 101 - len(enough) > 1  # " . " among them
    assert counts["studies"] == len(enough)


def test_what_is_drawn_for_a_study_depends_on_its_id_alone(folder: Path) -> None:
    whole = {doc["study_id"]: doc for doc in task(folder).test_docs()}
    limited = task(folder)
    limited.build_all_requests(limit=7, rank=1, world_size=2)
    asked = {instance.doc["study_id"]: instance.doc for instance in limited.instances}
    assert 0 < len(asked) < 7
    assert all(whole[study_id] == doc for study_id, doc in asked.items())
    places = Counter(doc["target"] for doc in whole.values())
    assert all(binomtest(places[place], len(whole), 0.25).pvalue > 0.001 for place in range(4))


def test_requests_are_the_prompt_and_each_option_after_a_blank(folder: Path) -> None:
    one = task(folder)
    one.build_all_requests()
    doc = one.test_docs()[0]
    first = [instance for instance in one.instances if instance.doc_id == 0]
    assert [i.arguments for i in first] == [(doc["prompt"], f" {option}") for option in doc["choices"]]
    assert {i.request_type for i in first} == {"loglikelihood"} and [i.idx for i in first] == [0, 1, 2, 3]
    one.build_all_requests(chat_template=lambda messages, add_generation_prompt: "<chat>")
    assert [i.arguments for i in one.instances[:4]] == [("<chat>", option) for option in doc["choices"]]


def test_accuracies_are_lm_evals(folder: Path, score: Callable[..., Any]) -> None:
    """Independent: its own multiple choice, from the same log-likelihoods; all letters here are one byte."""
    result = score(task(folder), by(noise))
    expected: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for doc, answers in zip(result.documents, result.answers, strict=True):
        theirs = {"gold": doc["target"], "choices": doc["choices"]}
        for name, hit in MultipleChoiceTask.process_results(None, theirs, answers).items():
            expected[name].append(hit)
    abnormal = [doc["abnormal"] for doc in result.documents]
    assert 0 < sum(abnormal) < len(abnormal)
    for name, hits in expected.items():
        assert result.value(name) == pytest.approx(np.mean(hits))
        assert result.value(f"{name}_abnormal") == pytest.approx(np.mean(np.array(hits)[abnormal]))
        assert result.estimates[f"{name}_abnormal"].n == sum(abnormal) == result.details["counts"]["abnormal_studies"]
    assert expected["acc"] != expected["acc_norm"]


def test_bytes_count_where_letters_have_several(
    tmp_path: Path, write_set: Callable[..., Path], score: Callable[..., Any]
) -> None:
    texts = ["Cardiomégaly, éééééé, cardiomegaly.", "Pulmonary edema.", "Pneumothorax.", "Rib fracture."]
    studies = [study(k, text, split) for k, text in enumerate(texts) for split in ("test",)]
    studies += [study(k + 10, text, "train") for k, text in enumerate(texts)]
    one = task(write_set(tmp_path / "set", studies))
    result = score(one, by(lambda context, option: -float(len(option.encode()) - 1)))  # a nat per byte: all tie
    assert result.value("acc_norm") == pytest.approx(0.25)


def test_floors_are_chance_the_usual_and_the_alike(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), by(noise))
    train = Counter(same_words(s.impression) for s in read_dataset(folder).studies if s.split == "train")
    hits = []
    for doc in result.documents:
        counts = [train[same_words(option)] for option in doc["choices"]]
        best = [place for place, count in enumerate(counts) if count == max(counts)]
        hits.append((doc["target"] in best) / len(best))
    estimate = result.estimates["acc"]
    floors = estimate.extra["floors"]
    assert set(floors) == {"chance", "frequency", "tfidf"}
    assert floors["chance"] == 0.25
    assert floors["frequency"] == pytest.approx(np.mean(hits))
    assert floors["tfidf"] > 0.9  # findings of this set begin with their impression
    assert estimate.floor == max(floors.values())
    assert result.estimates["acc_norm_abnormal"].extra["floors"] != floors


def test_a_constant_model_scores_chance_and_one_that_looks_scores_all(folder: Path, score: Callable[..., Any]) -> None:
    constant = score(task(folder), by(lambda context, option: -5.0))
    assert constant.value("acc") == 0.25
    perfect = score(task(folder), by(lambda context, option: 0.0 if option.strip() in context else -9.0))
    assert perfect.value("acc") == perfect.value("acc_norm_abnormal") == 1.0


def test_answers_that_are_no_numbers_are_wrong_and_counted(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), by(lambda context, option: float("nan") if option.strip() in context else -9.0))
    assert result.value("acc") == 0.0
    assert result.details["counts"]["answers_not_a_number"] >= len(result.documents)


def test_rows_may_come_in_any_order_and_records_hold_every_score(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), by(noise))
    order = np.random.default_rng(1).permutation(len(result.rows))
    shuffled = task(folder).estimates([result.rows[k] for k in order])
    assert {name: one.to_dict() for name, one in shuffled.items()} == {
        name: one.to_dict() for name, one in result.estimates.items()
    }
    assert np.mean([r["value"] for r in result.records if r["label"] == "acc"]) == pytest.approx(result.value("acc"))
    assert len(result.records) == 2 * len(result.documents)
    right = {doc["study_id"]: str(doc["target"]) for doc in result.documents}
    assert all((r["answer"] == right[r["study"]]) == (r["value"] == 1) for r in result.records)


def test_options_that_share_the_choice_are_all_its_answer(folder: Path, score: Callable[..., Any]) -> None:
    for constant in (-5.0, float("nan")):
        records = score(task(folder), by(lambda context, option, one=constant: one)).records
        assert {r["answer"] for r in records if r["label"] == "acc"} == {"0+1+2+3"}


def test_without_abnormal_studies_their_accuracy_is_undefined(
    tmp_path: Path, write_set: Callable[..., Path], score: Callable[..., Any]
) -> None:
    normal = {"labels": {"mesh": {"No Finding": 1}}}
    texts = (NORMAL[0], "Cardiomegaly.", "Pulmonary edema.", "Pneumothorax.", "Rib fracture.")
    studies = [study(k, text, "test", **normal) for k, text in enumerate(texts)]
    result = score(task(write_set(tmp_path / "set", [*studies, study(9, "Edema.", "train")])), by(noise))
    assert np.isnan(result.value("acc_abnormal"))
    assert result.estimates["acc_abnormal"].reason == "no abnormal study"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"distractors": "harder"}, "one of other_labels, same_labels, but got 'harder'"),
        ({"prompt": "{findings} {impression}"}, r"without \{impression\}"),
        ({"generation_kwargs": {}}, "unknown key 'generation_kwargs'"),
    ],
)
def test_a_wrong_declaration_is_refused_before_any_data(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(tmp_path / "nowhere", **config)


def test_a_set_that_has_no_distractors_or_no_train_split_says_so(
    tmp_path: Path, write_set: Callable[..., Path]
) -> None:
    few = write_set(tmp_path / "few", [study(k, "Edema.", "test") for k in range(5)])
    with pytest.raises(UserError, match="5 times both, never with 3 distractors of other_labels"):
        task(few).test_docs()
    texts = (NORMAL[0], "Cardiomegaly.", "Pulmonary edema.", "Pneumothorax.")
    alone = write_set(tmp_path / "alone", [study(k, text, "test") for k, text in enumerate(texts)])
    with pytest.raises(UserError, match="split train"):  # before a model is asked
        task(alone).test_docs()


class Vectors:
    """A model that has vectors of texts and cannot say how likely one is."""

    CAPABILITIES = frozenset({"embed:text"})

    def answers(self, requests: Sequence[Instance]) -> list[Embedding]:
        """Words that two texts share bring their vectors together."""
        found = []
        for request in requests:
            vector = np.zeros(256, dtype=np.float32)
            for word in same_words(request.arguments[0].text).split():
                vector[crc32(word.encode()) % 256] = 1
            found.append(Embedding(vector / np.linalg.norm(vector)))
        return found


def test_a_model_with_vectors_alone_answers_by_similarity(folder: Path, score: Callable[..., Any]) -> None:
    one, lm = task(folder), Vectors()
    assert one.needs(lm) == {"embed:text"} and one.refuses(lm) is None
    one.prepare_for(lm)
    result = score(one, lm.answers)
    assert result.details["answered_by"] == "similarity"
    first = one.construct_requests(one.documents[0], "", metadata=("c", 0, 1))
    assert {i.request_type for i in first} == {one.OUTPUT_TYPE} == {"embed"}
    assert [i.arguments[0].text for i in first[1:]] == one.documents[0]["choices"]
    assert first[0].arguments[0].text.endswith("Seen 0.")  # the findings, without the words of the prompt
    assert result.value("acc") == result.value("acc_norm") > 0.95  # the findings hold the impression's words
    assert result.estimates["ece"].reason == "cosines are no probabilities"


def test_a_model_with_likelihoods_is_asked_for_them(folder: Path) -> None:
    class Both(Vectors):
        CAPABILITIES = frozenset({"embed:text", "loglikelihood"})

    class Headless(Both):
        lacks: ClassVar[dict[str, str]] = {"loglikelihood": "no head"}

    one = task(folder)
    assert one.needs(Both()) == one.needs(object()) == {"loglikelihood"}
    assert one.needs(Headless()) == {"embed:text"}


def test_other_words_of_a_prompt_are_refused_where_it_is_not_read(folder: Path) -> None:
    one = task(
        folder,
        prompt="Which impression belongs to the findings of this chest x-ray report?\n{findings}\n",
        perturbation={"name": "paraphrase", "severity": 1},
    )
    assert one.refuses(object()) is None
    assert "reads no prompt" in str(one.refuses(Vectors()))


def test_calibration_is_of_the_softmax_over_the_options(folder: Path, score: Callable[..., Any]) -> None:
    sure_and_wrong = score(task(folder), by(lambda context, option: -99.0 if option.strip() in context else 0.0))
    assert sure_and_wrong.value("ece") == pytest.approx(1 / 3, abs=1e-6)  # the three others share the probability
    assert sure_and_wrong.value("brier") == pytest.approx(1 + 3 * (1 / 9), abs=1e-6)
    sure_and_right = score(task(folder), by(lambda context, option: 0.0 if option.strip() in context else -99.0))
    assert sure_and_right.value("ece") == pytest.approx(0, abs=1e-6)
    assert {"ece", "brier"} <= task(folder).lower_is_better()
