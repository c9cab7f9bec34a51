"""One perturbation of the demo tasks: what requests then hold, and what stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness import plugin
from medvlm_harness.data.records import Dataset, Study
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.perturbations.image import CORRUPTIONS, Case, find_corruption
from medvlm_harness.perturbations.text import TEXT_PERTURBATIONS, find_text_perturbation, perturb_text
from medvlm_harness.requests import ImageRef, LabelSet, TextRef
from medvlm_harness.results.table import interval_table
from medvlm_harness.tracks.entity_probe import EntityProbe
from medvlm_harness.tracks.perturbed import read_perturbation
from medvlm_harness.tracks.radgraph_entities import RadGraphEntities
from medvlm_harness.tracks.report_generation import ReportGeneration
from medvlm_harness.tracks.zero_shot import ZeroShot

NOISE = {"name": "gaussian_noise", "severity": 3}
SYNONYMS = {"name": "synonyms", "severity": 3}
UPPER = {"name": "case", "severity": 2}  # changes every text

Make = Callable[..., Any]


@pytest.fixture
def make(demo: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """A demo task, perturbed by --metadata."""
    plugin.install()
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from lm_eval.tasks import TaskManager

    def load(name: str, perturbation: Any = None, **metadata: Any) -> Any:
        said = {} if perturbation is None else {"perturbation": perturbation}
        given = {"data_dir": str(demo.folder), "label_source": "template", **said, **metadata}
        (task,) = TaskManager(metadata=given).load([f"demo_cxr_{name}"])["tasks"].values()
        return task

    return load


def built(task: Any, **options: Any) -> list[Any]:
    task.build_all_requests(**options)
    instances: list[Any] = task.instances
    return instances


def images_of(instances: list[Any]) -> list[ImageRef]:
    arguments = [one for instance in instances for one in instance.arguments]
    shown = [one["visual"] for one in arguments if isinstance(one, dict) and "visual" in one]
    return [one for one in arguments if isinstance(one, ImageRef)] + [ref for refs in shown for ref in refs]


# --- declarations


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("gaussian_noise", r"a mapping such as \{name: gaussian_noise, severity: 3\}, but got 'gaussian_noise'"),
        ({"suite": "quick"}, "suites are what the robustness tasks run: iu_cxr_robustness"),
        ({"name": "gaussian_noise", "severtiy": 3}, "unknown key 'severtiy' in perturbation. Did you mean severity"),
        ({"name": "gausian_noise", "severity": 3}, "no perturbation 'gausian_noise'. Did you mean gaussian_noise"),
        ({"severity": 3}, "no perturbation None"),
        ({"name": "gaussian_noise", "severity": 6}, "Severity of gaussian_noise: expected 1 to 5, got 6"),
        ({"name": "gaussian_noise", "severity": 0}, "expected 1 to 5, got 0"),
        ({"name": "gaussian_noise", "severity": True}, "expected 1 to 5, got True"),
        ({"name": "gaussian_noise", "severity": "3"}, "expected 1 to 5, got '3'"),
        ({"name": "gaussian_noise"}, "expected 1 to 5, got None"),
        ({"name": "inversion", "severity": 2}, r"expected 1 alone \(it has no degrees\), got 2"),
        ({"name": "defocus_blur", "severity": 1}, "declared for fundus, oct, not for chest"),
    ],
)
def test_a_wrong_declaration_is_one_clear_line(make: Make, declared: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make("zeroshot", declared)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "declared", "message"),
    [
        ("text_zeroshot", NOISE, "gaussian_noise is for images, but of this task only texts of reports can be"),
        ("text_zeroshot", {"name": "typoes", "severity": 1}, "Did you mean typos"),
        ("text_zeroshot", {"name": "typos", "severity": 0}, "Severity of typos: expected 1 to 3, got 0"),
        ("summarization", NOISE, "gaussian_noise is for images, but of this task only texts of reports and prompts"),
        ("summarization", {"name": "paraphrase", "severity": 4}, "paraphrase at severity 4 has no other words for the"),
        ("report_generation", SYNONYMS, "synonyms is for texts of reports, but the requests of this task hold none"),
    ],
)
def test_a_track_refuses_what_it_cannot_perturb(make: Make, task: str, declared: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        raise UserError(str(make(task, declared).unfit))  # a row of the run, or the run itself ends


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zeroshot", "typos is for texts of reports and prompts, but of this task only images can be perturbed"),
        ("report_generation", "typos is for texts of reports, but the requests of this task hold none"),
        ("robustness_zeroshot", "runs a suite, which --metadata suite=... chooses"),
    ],
)
def test_asked_of_a_whole_run_it_is_done_where_it_fits(make: Make, name: str, message: str) -> None:
    typos = {"name": "typos", "severity": 1}
    task = make(name, typos)
    assert str(task.refuses(None)).startswith(message)
    assert task.perturbation.to_dict() is None
    assert make("text_zeroshot", typos).refuses(None) is None
    with pytest.raises(UserError, match="typos is for texts"):  # the YAML's own is an error of the YAML
        ZeroShot({"task": "t", "dataset": "mine", "labels": ["Edema"], "perturbation": typos})


def test_a_prompt_without_other_words_is_refused_by_itself(make: Make) -> None:
    task = make("summarization", {"name": "paraphrase", "severity": 4})
    assert "has no other words for the prompt" in str(task.refuses(None))
    assert task.perturbation.to_dict() is None and task.prompt == make("summarization").prompt


@pytest.mark.parametrize("track", [EntityProbe, RadGraphEntities])
@pytest.mark.parametrize("declared", [NOISE, SYNONYMS, {"name": "paraphrase", "severity": 1}])
def test_what_annotators_marked_is_not_perturbed(track: Any, declared: Any) -> None:
    config = {"task": "t", "dataset": "radgraph", "modality": "chest", "perturbation": declared, "prompt": "{findings}"}
    with pytest.raises(UserError, match="t: takes no perturbation"):
        track({key: value for key, value in config.items() if key in {*track.KEYS, "task"}})


def test_images_of_an_unknown_kind_are_not_perturbed() -> None:
    config = {"task": "t", "dataset": "mine", "labels": ["Edema"]}
    with pytest.raises(UserError, match="t: expected `modality:` to say what kind of images gaussian_noise is for"):
        ZeroShot({**config, "perturbation": NOISE})
    with pytest.raises(UserError, match=r"Unknown modality 'chets'\. Did you mean chest"):
        ZeroShot({**config, "perturbation": NOISE, "modality": "chets"})
    made = ZeroShot({**config, "perturbation": NOISE, "modality": "ct"})
    assert made.perturbation.image == Case(find_corruption("gaussian_noise", "ct"), 3)


@pytest.mark.parametrize("seed", [-1, True, "1", 0.5])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(UserError, match="perturbation_seed to be a whole number from 0 on"):
        read_perturbation(NOISE, task="t", takes={"image"}, modality="chest", seed=seed)


def test_the_run_goes_before_the_yaml() -> None:
    config = {"task": "t", "dataset": "mine", "labels": ["Edema"], "modality": "chest", "perturbation": NOISE}
    assert ZeroShot(config).dump_config()["perturbation"]["name"] == "gaussian_noise"
    other = ZeroShot({**config, "metadata": {"perturbation": {"name": "inversion"}, "perturbation_seed": 4}})
    said = other.dump_config()["perturbation"]
    assert (said["name"], said["severity"], said["seed"]) == ("inversion", 1, 4)
    clean = ZeroShot({**config, "metadata": {"perturbation": None}})
    assert "perturbation" not in clean.dump_config() and clean.perturbation.to_dict() is None


def test_no_name_is_of_images_and_of_texts() -> None:
    assert not {one.name for one in CORRUPTIONS}.intersection(one.name for one in TEXT_PERTURBATIONS)


# --- images


@pytest.mark.parametrize("name", ["zeroshot", "view", "retrieval", "report_generation"])
def test_every_image_of_a_scored_study_is_perturbed_and_nothing_else(make: Make, name: str) -> None:
    clean, noisy = built(make(name)), built(make(name, NOISE, perturbation_seed=2))
    case = Case(find_corruption("gaussian_noise", "chest"), 3, seed=2)
    before, after = images_of(clean), images_of(noisy)
    assert before and [ref.file_sha256 for ref in after] == list(before)
    scored = {image.sha256 for study in make(name).studies for image in study.images}
    assert {ref.perturbation for ref in after if ref.file_sha256 in scored} == {case}
    assert not {ref.perturbation for ref in after if ref.file_sha256 not in scored} - {None}  # thresholds' are clean
    assert scored.intersection(before) and not scored.intersection(after)
    texts = [[one for one in i.arguments if isinstance(one, (TextRef, LabelSet))] for i in clean]
    assert [[one for one in i.arguments if isinstance(one, (TextRef, LabelSet))] for i in noisy] == texts
    assert [i.doc for i in noisy] == [i.doc for i in clean]  # documents name the files


def test_a_probe_learns_from_images_as_they_are(make: Make) -> None:
    instances = built(make("image_probe", NOISE))
    for instance in instances:
        scored = instance.doc["split"] == "test"
        assert (instance.arguments[0].perturbation is not None) == scored
    assert {instance.doc["split"] for instance in instances} == {"train", "validation", "test"}


def test_the_floor_searches_train_images_as_they_are(make: Make) -> None:
    task = make("report_generation", NOISE, split="all")
    exemplars = task.exemplars
    assert exemplars and all(one.image.perturbation is None for one in exemplars)
    assert all(ref.perturbation for ref in images_of(built(task, limit=3)))


@pytest.mark.parametrize("name", ["image_use_labels", "image_use_reports"])
def test_another_patients_image_is_perturbed_as_the_own_one_and_grey_is_not(make: Make, name: str) -> None:
    clean, noisy = images_of(built(make(name), limit=4)), images_of(built(make(name, NOISE), limit=4))
    assert [ref.file_sha256 for ref in noisy] == list(clean)
    assert [ref.perturbation is not None for ref in noisy] == [True, True, False] * 4


def test_a_ceiling_knows_its_image_under_noise(make: Make, score: Callable[..., Any]) -> None:
    oracle = BaselineBackend(kind="oracle")
    clean, noisy = (score(make("zeroshot", said), oracle.classify) for said in (None, NOISE))
    assert {k: v.value for k, v in noisy.estimates.items()} == {k: v.value for k, v in clean.estimates.items()}
    assert noisy.value("auroc") == 1
    before, after = (oracle.embed(built(make("image_probe", said), limit=3)) for said in (None, NOISE))
    assert [str(one) for one in after] == [str(one) for one in before]


# --- texts


def said_of(study: Study, section: str, declared: dict[str, Any] = UPPER) -> str:
    perturbation = find_text_perturbation(declared["name"])
    return perturb_text(getattr(study, section).strip(), perturbation, declared["severity"]).text


def test_texts_to_classify_and_to_search_with_are_perturbed(make: Make, demo: Dataset) -> None:
    studies = {study.study_id: study for study in demo.studies}
    for instance in built(make("text_zeroshot", UPPER)):
        study = studies[instance.doc["study_id"]]
        clean = study.split == "validation"  # which thresholds come from
        assert instance.arguments[0].text == (study.findings.strip() if clean else said_of(study, "findings"))
    for instance in built(make("retrieval", UPPER)):
        if isinstance(instance.arguments[0], TextRef):
            study, kind = studies[instance.doc["study_id"]], list(instance.doc["texts"])[instance.idx - 1]
            parts = {name: said_of(study, name) for name in ("findings", "impression")}
            expected = " ".join(filter(None, parts.values())) if kind == "report" else parts[kind]
            assert instance.arguments[0].text == expected and str(instance.arguments[0]) == instance.doc["texts"][kind]
    for instance in built(make("text_retrieval", UPPER)):
        study = studies[instance.doc["study_id"]]
        expected = study.impression.strip() if instance.idx else said_of(study, "findings")
        assert instance.arguments[0].text == expected  # the counterpart stays


def test_a_probe_learns_from_texts_as_they_are(make: Make, demo: Dataset) -> None:
    studies = {study.study_id: study for study in demo.studies}
    for instance in built(make("text_probe", UPPER)):
        study = studies[instance.doc["study_id"]]
        expected = said_of(study, "findings") if study.split == "test" else study.findings.strip()
        assert instance.arguments[0].text == expected
        assert instance.doc["texts"]["findings"] == str(TextRef(expected))


@pytest.mark.parametrize("name", ["summarization", "impression_choice", "entities"])
def test_prompts_hold_the_perturbed_report_and_nothing_else_does(make: Make, name: str, demo: Dataset) -> None:
    clean, perturbed = make(name), make(name, UPPER)
    studies = {study.study_id: study for study in demo.studies}
    changed = 0
    for before, after in zip(clean.documents, perturbed.documents, strict=True):
        study = studies[after["study_id"]]
        expected = before["prompt"]
        for section in perturbed.input_sections():
            if text := getattr(study, section).strip():
                expected = expected.replace(text, said_of(study, section))
        assert after["prompt"] == expected
        assert {**after, "prompt": ""} == {**before, "prompt": ""}  # source, target and options stay
        changed += after["prompt"] != before["prompt"]
    assert changed == len(clean.documents) > 0


def test_floors_read_what_a_model_reads_and_facts_are_checked_against_the_report(
    make: Make, score: Callable[..., Any], demo: Dataset
) -> None:
    studies = {study.study_id: study for study in demo.studies}
    task = make("summarization", UPPER)
    (doc, *_) = task.documents
    assert task.floors_of(doc)["copy"] == said_of(studies[doc["study_id"]], "findings")
    assert task.fact_source(doc) == studies[doc["study_id"]].findings.strip()
    task = make("entities", UPPER)
    (doc, *_) = task.documents
    assert task.floors_of(doc)["copy"] == task.floors_of(doc)["copy"].upper()


def test_a_prompt_is_put_in_other_words(make: Make) -> None:
    clean, other = make("summarization"), make("summarization", {"name": "paraphrase", "severity": 1})
    assert other.prompt.startswith("Write the impression that sums up the findings of this chest x-ray report.")
    assert other.prompt.partition("\n")[2] == clean.prompt.partition("\n")[2]
    assert other.dump_config()["perturbation"]["of"] == "prompt"
    assert {"image", "report", "prompt"} == ReportGeneration.PERTURBS
    shown = make("image_use_reports", {"name": "paraphrase", "severity": 1})
    assert "Report the findings on this chest x-ray" in shown.documents[0]["prompt"]


# --- results


def test_results_say_what_was_done_and_how_many_texts_it_changed(make: Make, score: Callable[..., Any]) -> None:
    task = make("text_zeroshot", {"name": "abbreviations", "severity": 1}, perturbation_seed=5)
    details = score(task, BaselineBackend(kind="prior").classify).details
    said = details["perturbation"]
    kept = {key: said[key] for key in ("name", "severity", "seed", "of", "control")}
    assert kept == {"name": "abbreviations", "severity": 1, "seed": 5, "of": "report", "control": False}
    assert said["identity"] == find_text_perturbation("abbreviations").identity(1, seed=5)
    texts = [study.findings.strip() for study in task.studies if study.study_id in {row.study_id for row in task.rows}]
    results = [perturb_text(text, find_text_perturbation("abbreviations"), 1, seed=5) for text in texts]
    assert said["texts"] == len(texts) and 0 < said["texts_changed"] < 1
    assert said["texts_changed"] == pytest.approx(sum(one.changed for one in results) / len(texts))
    assert said["edits_kept_back"] == pytest.approx(sum(one.kept_back for one in results) / len(texts))
    json.dumps([details["perturbation"], task.dump_config()])
    shown = {**details, "contamination": {"note": None}, "metrics": {}, "subgroups": {}}
    line = interval_table({"tasks": {"t": shown}, "unsupported": {}}).splitlines()[0]
    assert f"; perturbed: abbreviations@1 ({said['texts_changed']:.1%} of {len(texts)} texts changed); " in line


def test_the_identity_of_an_image_perturbation_is_in_the_results(make: Make, score: Callable[..., Any]) -> None:
    task = make("view", NOISE)
    details = score(task, BaselineBackend(kind="prior").classify).details
    assert details["perturbation"] == task.dump_config()["perturbation"]
    assert details["perturbation"]["identity"] == Case(find_corruption("gaussian_noise", "chest"), 3).identity
    assert task.dump_config()["modality"] == "chest"
    shown = {**details, "contamination": {"note": None}, "metrics": {}, "subgroups": {}}
    assert "; perturbed: gaussian_noise@3; " in interval_table({"tasks": {"t": shown}, "unsupported": {}})
    assert score(make("view"), BaselineBackend(kind="prior").classify).details["perturbation"] is None
