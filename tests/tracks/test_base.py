from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import LabelScores
from medvlm_harness.tracks.zero_shot import ZeroShot

SPLITS = {"train": 3, "validation": 2, "test": 4}


@pytest.fixture
def folder(tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image]) -> Path:
    studies = [
        Study(
            f"{split}{k}",
            f"{split}{k}",
            (fake_image(f"{split}{k}.png"),),
            labels={"mesh": {"Edema": k % 2}, "rules": {"Edema": 1 - k % 2}, "theirs": {"Edema": 1}},
            split=split,
        )
        for split, n in SPLITS.items()
        for k in range(n)
    ]
    return write_set(tmp_path / "synthetic", studies, revision="abc", label_names=("Edema",))


def task(folder: Path | None, **config: Any) -> ZeroShot:
    metadata = {"version": 3, **({"data_dir": str(folder)} if folder else {}), **config.pop("metadata", {})}
    return ZeroShot({"task": "t", "dataset": "synthetic", "labels": ["Edema"], **config, "metadata": metadata})


def constant(requests: Sequence[Instance]) -> list[LabelScores]:
    return [LabelScores((0.0,), (0.5,)) for _ in requests]


@pytest.mark.parametrize(
    ("asked", "documents", "shown"),
    [
        (None, 4, "test"),
        ("test", 4, "test"),
        ("val", 2, "validation"),
        ("validation+test", 6, "validation+test"),
        ("test+validation", 6, "validation+test"),
        ("all", 9, "train+validation+test+unassigned"),
    ],
)
@pytest.mark.parametrize("at_run_time", [False, True])
def test_splits_are_chosen_by_the_yaml_or_the_run(
    folder: Path, asked: str | None, documents: int, shown: str, at_run_time: bool, score: Callable[..., Any]
) -> None:
    said = {} if asked is None else {"metadata": {"split": asked}} if at_run_time else {"split": asked}
    one = task(folder, **said)
    result = score(one, constant)
    assert len(result.documents) == documents
    assert result.details["split"] == one.dump_config()["split"] == shown


def test_the_run_outranks_the_yaml(folder: Path) -> None:
    assert len(task(folder, split="train", metadata={"split": "validation"}).test_docs()) == 2


def test_an_unknown_split_names_the_near_one(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'tset'\. Did you mean test\?"):
        task(folder, metadata={"split": "tset"}).test_docs()


def test_an_empty_split_says_which_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"unassigned \(it has test, train, validation\)"):
        task(folder, split="unassigned").test_docs()


def test_label_sources_have_an_order_and_an_unknown_one_is_refused(folder: Path) -> None:
    assert task(folder).label_source == "rules"
    assert task(folder).other_sources == ("mesh", "theirs")
    assert task(folder, metadata={"label_source": "theirs"}).label_source == "theirs"
    with pytest.raises(UserError, match="one of mesh, rules, theirs, but got 'chexpert'"):
        task(folder, metadata={"label_source": "chexpert"}).test_docs()


def test_a_source_outside_the_order_is_used_where_it_is_the_only_one(
    tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> None:
    study = Study("s", "p", (fake_image("a.png"),), labels={"theirs": {"Edema": 1}}, split="test")
    assert task(write_set(tmp_path / "set", [study], label_names=("Edema",))).label_source == "theirs"


def test_a_set_without_labels_says_how_to_get_them(
    tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> None:
    bare = write_set(tmp_path / "set", [Study("s", "p", (fake_image("a.png"),), split="test")])
    with pytest.raises(UserError, match="without labels: use --labels"):
        task(bare).test_docs()


def test_no_data_is_touched_before_the_first_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = task(None)
    assert one.metric_names is not None
    with pytest.raises(UserError, match="no synthetic data found"):
        one.test_docs()


def test_the_data_is_found_by_argument_and_by_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task(folder).data.folder == folder.resolve()
    assert task(folder.parent).data.folder == folder.resolve()
    monkeypatch.setenv("MEDVLM_DATA", str(folder.parent))
    assert task(None).data.folder == folder.resolve()


def test_details_say_what_the_data_is(folder: Path, score: Callable[..., Any]) -> None:
    one = task(folder)
    details = score(one, constant).details
    assert details["dataset"]["name"] == "synthetic"
    assert details["dataset"]["revision"] == "abc"
    assert details["dataset"]["sha256"] == one.data.sha256
    assert details["version"] == 3


def test_only_the_yamls_own_metadata_is_written(folder: Path) -> None:
    one = task(folder, metadata={"split": "validation", "pretrained": "weights", "token": "secret"})
    assert one.dump_config()["metadata"] == {"version": 3}
    assert "secret" not in str(one.dump_config())
    assert one.metadata_keys == {"data_dir", "split", "pretrained", "token"}


def test_what_else_the_yaml_says_of_itself_is_kept_and_no_runtime_key(folder: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("task: mine\nmetadata: {version: 2.0, contact: somebody}\n")
    merged = {"version": 2.0, "contact": "somebody", "split": "test", "token": "secret", "config_source": str(yaml)}
    one = task(folder, metadata=merged)
    assert one.dump_config()["metadata"] == {"version": 2.0, "contact": "somebody"}
    assert one.metadata_keys == {"split", "token", "data_dir"}


def test_a_constant_model_scores_one_half_and_undefined_is_nan(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), constant)
    assert result.value("auroc_edema") == 0.5
    assert np.isnan(result.value("auroc"))  # two positives: too few for a macro
    assert "no label has 10" in str(result.estimates["auroc"].reason)


def test_samples_are_logged_under_the_number_they_have(folder: Path) -> None:
    one = task(folder)
    asked = [3, 0]
    # lm-eval logs the k-th document that it gets as document asked[k].
    pairs = dict(one.doc_iterator(samples=asked))
    assert {asked[k]: document for k, document in pairs.items()} == {n: one.documents[n] for n in asked}
    # The studies' own numbers decide whose they are, not the places among those asked for.
    assert list(one.doc_iterator(samples=asked, rank=0, world_size=2)) == [(1, one.documents[0])]
    assert list(one.doc_iterator(samples=asked, rank=1, world_size=2)) == [(0, one.documents[3])]
    with pytest.raises(UserError, match=r"document 4, but they go from 0 to 3"):
        one.doc_iterator(samples=[4])


# --- documents to fit on


class Fitting(ZeroShot):
    """As a task with thresholds: the validation images beside those of the chosen splits."""

    def make_fitting_documents(self) -> Iterator[dict[str, Any]]:
        others = (study for study in self.data.studies if study.split == "validation")
        for study, image, targets in self.labelled(others):
            yield {**self.document_ids(study, image), "target": targets[self.source], "targets": targets}

    def estimate(self, rows: Sequence[Any]) -> Mapping[str, Estimate]:
        self.given = [row.study_id for row in rows]
        return super().estimate([row for row in rows if row.split in self.splits])


def fitting_task(folder: Path, **config: Any) -> Fitting:
    metadata = {"version": 1, "data_dir": str(folder)}
    return Fitting({"task": "t", "dataset": "synthetic", "labels": ["Edema"], "metadata": metadata, **config})


def test_documents_to_fit_on_come_behind_those_that_are_scored(folder: Path) -> None:
    one = fitting_task(folder)
    numbered = list(one.doc_iterator())
    assert [number for number, _ in numbered] == list(range(6))
    assert [doc["study_id"] for _, doc in numbered] == [*(f"test{k}" for k in range(4)), "validation0", "validation1"]
    assert [doc for _, doc in numbered][:4] == one.test_docs() == task(folder).test_docs()
    assert own_part(one) == list(range(6))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_them_too(folder: Path, world_size: int) -> None:
    one = fitting_task(folder)
    parts = [list(one.doc_iterator(rank=rank, world_size=world_size)) for rank in range(world_size)]
    own = [item for part in parts for item in part if "stand_in" not in item[1]]
    assert sorted(number for number, _ in own) == list(range(6))
    assert dict(own) == dict(one.doc_iterator())
    assert all(part for part in parts)


def test_a_limit_shortens_both_and_samples_leave_none(folder: Path) -> None:
    one = fitting_task(folder)
    limited = list(one.doc_iterator(limit=1))
    assert [(number, doc["study_id"]) for number, doc in limited] == [(0, "test0"), (4, "validation0")]
    assert [number for number, _ in one.doc_iterator(limit=100)] == list(range(6))
    assert [doc["study_id"] for _, doc in one.doc_iterator(samples=[2])] == ["test2"]


def test_they_are_given_to_the_estimate_and_scored_by_nothing(folder: Path) -> None:
    one = fitting_task(folder)
    rows = [one.process_results(doc, [LabelScores((0.0,), (0.5,))])["auroc"] for _, doc in one.doc_iterator()]
    assert one.estimates(rows[::-1])["auroc_edema"].n == 4
    assert one.given == [*(f"test{k}" for k in range(4)), "validation0", "validation1"]
    assert [row.study_id for row in one.rows] == [f"test{k}" for k in range(4)]
    details = one.details()
    assert (details["documents"], details["scored"]) == (4, 4)
    assert {record["study"] for record in one.score_records(one.rows)} == {f"test{k}" for k in range(4)}


def test_they_are_never_perturbed(folder: Path) -> None:
    one = fitting_task(folder, modality="chest", perturbation={"name": "gaussian_noise", "severity": 3})
    one.build_all_requests()
    changed = {instance.doc["study_id"] for instance in one.instances if instance.arguments[0].perturbation}
    assert changed == {f"test{k}" for k in range(4)}
    assert len(one.instances) == 6


# --- several processes


@pytest.fixture
def two_views(tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image]) -> Path:
    """Seven studies, every fourth without a frontal image."""
    studies = [
        Study(
            f"s{k}",
            f"p{k}",
            tuple(fake_image(f"{k}{view}.png", view) for view in ("frontal", "lateral")[k % 4 == 0 :]),
            labels={"rules": {"Edema": k % 2}},
            split="test",
        )
        for k in range(7)
    ]
    return write_set(tmp_path / "views", studies, label_names=("Edema",))


def own_part(one: ZeroShot, **options: Any) -> list[int]:
    """The documents' numbers in one process's requests."""
    one.build_all_requests(**options)
    return [instance.doc_id for instance in one.instances]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_document_has_one_process_and_each_image_the_same_one_in_every_task(
    two_views: Path, world_size: int
) -> None:
    everything, frontal = task(two_views), task(two_views, views=["frontal"])
    owner: dict[str, int] = {}
    for one in (everything, frontal):
        parts = [list(one.doc_iterator(rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert sorted(number for part in parts for number, _ in part) == list(range(len(one.documents)))
        for rank, part in enumerate(parts):
            for number, document in part:
                assert document is one.documents[number]
                assert owner.setdefault(document["study_id"], rank) == rank
    assert len(frontal.documents) < len(everything.documents)
    assert set(owner.values()) == set(range(world_size))


@pytest.mark.parametrize("limit", [2, 5, 100])
def test_a_limit_takes_the_first_documents_of_all_and_then_shares_them(two_views: Path, limit: int) -> None:
    one = task(two_views)
    parts = [own_part(one, rank=rank, world_size=2, limit=limit) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(min(limit, len(one.documents))))
    assert own_part(one, limit=limit) == sorted(parts[0] + parts[1])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused(folder: Path, limit: int) -> None:
    with pytest.raises(UserError, match=f"--limit to be more than 0, but got {limit}"):
        task(folder).build_all_requests(limit=limit)


def test_a_process_without_documents_has_a_stand_in_that_counts_nowhere(folder: Path) -> None:
    one = task(folder, split="all")  # nothing beside it to fit on
    gathered, logged = [], []
    for rank in range(3):
        ((number, document),) = one.doc_iterator(rank=rank, world_size=3, limit=1)
        assert own_part(one, rank=rank, world_size=3, limit=1) == [number] == [0]
        row = one.process_results(document, [LabelScores((0.25,), (0.5,))])["auroc"]
        gathered.append(row)
        logged.append({"doc_id": number, "doc": document})
    assert [row is None for row in gathered] == [False, True, True]
    assert np.isnan(one.aggregation()["auroc"](gathered))
    # lm-eval takes the length of this very list for the number of documents.
    assert [row.study_id for row in gathered] == ["test0"] == [row.study_id for row in one.rows]
    assert one.as_one_process(logged) == [{"doc_id": 0, "doc": one.documents[0]}]


@pytest.mark.parametrize(("asked", "order"), [(None, [0, 1, 2, 3, 4, 5]), ([3, 0, 2], [3, 0, 2])])
def test_what_processes_log_comes_in_the_order_of_one(folder: Path, asked: list[int] | None, order: list[int]) -> None:
    one = task(folder)
    logged = []
    for rank in (0, 1):
        for number, document in one.doc_iterator(rank=rank, world_size=2, samples=asked):
            logged.append({"doc_id": asked[number] if asked else number, "doc": document})  # as lm-eval does
    ordered = one.as_one_process(logged)
    assert [sample["doc_id"] for sample in ordered] == order
    everything = [*one.documents, *one.fitting_documents]  # 4 of test, 2 of validation
    assert [sample["doc"] for sample in ordered] == [everything[number] for number in order]


def test_responses_that_pad_the_shorter_process_are_dropped(folder: Path) -> None:
    one = task(folder)
    one.build_all_requests()
    for k, instance in enumerate(one.instances):
        instance.resps = [LabelScores((float(k),), (0.5,))] * (3 if k == len(one.instances) - 1 else 1)
    one.apply_filters()
    assert [len(instance.resps) for instance in one.instances] == [1] * 6
    assert [instance.filtered_resps["none"].margin for instance in one.instances] == [(float(k),) for k in range(6)]


# --- documents to fit on


@pytest.mark.parametrize(("options", "scored", "fitted"), [({}, 4, 2), ({"limit": 1}, 1, 1), ({"samples": [2]}, 1, 0)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_documents_to_fit_on_come_last_and_belong_to_one_process_each(
    folder: Path, options: dict[str, Any], scored: int, fitted: int, world_size: int
) -> None:
    one = task(folder)
    parts = [list(one.doc_iterator(rank=rank, world_size=world_size, **options)) for rank in range(world_size)]
    for part in parts:
        assert [doc["split"] for _, doc in part] == sorted(doc["split"] for _, doc in part)  # test, then validation
    own = [(number, doc) for part in parts for number, doc in part if "stand_in" not in doc]
    assert sum(doc["split"] == "test" for _, doc in own) == scored
    assert sorted(number for number, doc in own if doc["split"] == "validation") == [4, 5][:fitted]


def test_rows_to_fit_on_are_not_scored(folder: Path, score: Callable[..., Any]) -> None:
    one = task(folder)
    result = score(one, constant)
    assert [row.split for row in result.rows] == ["test"] * 4 + ["validation"] * 2
    assert [row.study_id for row in one.rows] == ["test0", "test1", "test2", "test3"]
    assert (result.details["documents"], result.details["scored"]) == (4, 4)
    assert {record["split"] for record in result.records} == {"test"}


def test_there_are_no_few_shot_examples(folder: Path) -> None:
    one = task(folder)
    assert (one.has_test_docs(), one.has_training_docs(), one.has_validation_docs()) == (True, False, False)
    assert one.fewshot_context(one.test_docs()[0], num_fewshot=5) == ""
    assert one.dump_config()["num_fewshot"] == 0
