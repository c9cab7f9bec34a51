from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from lm_eval.api.instance import Instance
from rouge_score.rouge_scorer import RougeScorer

from medvlm_harness import plugin
from medvlm_harness.data.records import Dataset, Image, Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.coco import clean_report, coco_rouge_l
from medvlm_harness.metrics.report_floors import normal_report
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.requests import ImageRef
from medvlm_harness.results.run import unsupported_reason
from medvlm_harness.tracks.report_generation import ReportGeneration
from medvlm_harness.tracks.report_scorer import ReportScorer
from medvlm_harness.tracks.summarization import Summarization

FINDINGS = (
    "The heart is enlarged. There is a small left pleural effusion. No pneumothorax.",
    "The lungs are clear. Heart size is normal. No pleural effusion.",
    "Right lower lobe consolidation of 3 cm. No pleural effusion is seen.",
)
PROMPT = "{images}\nFindings:"


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """Sixty studies; some without findings, some without a frontal image, some without any."""
    studies = []
    for k in range(60):
        images = [] if k % 12 == 5 else [fake_image(f"{k}_lateral.png", "lateral")]
        images += [] if k % 12 in (5, 8) else [fake_image(f"{k}_b.png"), fake_image(f"{k}_a.png")]
        studies.append(
            Study(
                f"s{k:02}",
                f"p{k}",
                tuple(images),
                indication="Cough." if k % 4 else "",
                comparison="None." if k % 5 else "Chest radiograph of last year",
                findings="" if k % 11 == 7 else FINDINGS[k % 3],
                impression="Pneumonia." if k % 3 == 2 else "",
                labels={"rules": {"No Finding": 1 if k % 3 == 1 else None}},
                split="train" if k < 30 else "test",
            )
        )
    return write_set(tmp_path_factory.mktemp("reports") / "set", studies)


def task(folder: Path, **config: Any) -> ReportGeneration:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    return ReportGeneration({"task": "r", "dataset": "synthetic", "prompt": PROMPT, **config, "metadata": metadata})


def writes(text: Callable[[dict[str, Any]], str]) -> Callable[[Sequence[Instance]], list[str]]:
    return lambda requests: [text(request.doc) for request in requests]


# --- documents and requests


def test_documents_are_the_studies_with_findings_and_a_chosen_image_and_the_rest_is_counted(folder: Path) -> None:
    test = [study for study in read_dataset(folder).studies if study.split == "test"]
    with_findings = [study for study in test if study.findings]
    for images, has in (("frontal", lambda s: any(i.view == "frontal" for i in s.images)), ("all", lambda s: s.images)):
        made = task(folder, images=images)
        usable = [study for study in with_findings if has(study)]
        assert [doc["study_id"] for doc in made.documents] == [study.study_id for study in usable]
        assert [doc["target"] for doc in made.documents] == [study.findings for study in usable]
        counts = made.details()["counts"]
        what = "studies_without_frontal_image" if images == "frontal" else "studies_without_image"
        assert counts["studies_without_findings"] == len(test) - len(with_findings) > 0
        assert counts[what] == len(with_findings) - len(usable) > 0
        assert counts["studies_without_indication"] == sum(not study.indication for study in usable) > 0
    assert len(task(folder, images="all").documents) > len(task(folder).documents)


def test_a_request_has_the_images_in_lm_evals_form_and_documents_hold_no_path(folder: Path) -> None:
    made = task(folder, images="all", generation_kwargs={"until": ["\n"]})
    made.build_all_requests()
    first = made.instances[0]
    prompt, options, images = first.arguments
    assert first.request_type == "generate_until" and options == {"until": ["\n"]}
    assert prompt == "<image>\n<image>\n<image>\nFindings:"
    assert [ref.path.name for ref in images["visual"]] == ["30_a.png", "30_b.png", "30_lateral.png"]
    assert all(isinstance(ref, ImageRef) for ref in images["visual"])
    assert first.doc["images"] == [str(ref) for ref in images["visual"]]
    assert str(folder) not in json.dumps([instance.doc for instance in made.instances])
    assert "source" not in first.doc  # nothing that a filter could correct the text by


def test_a_chat_template_gets_the_prompt_with_its_marks(folder: Path) -> None:
    made = task(folder)
    made.build_all_requests(chat_template=lambda messages, add_generation_prompt: f"<u>{messages[-1]['content']}<a>")
    assert made.instances[0].arguments[0] == "<u><image>\nFindings:<a>"


# --- metrics


def test_the_reference_itself_scores_one(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(task(folder), writes(lambda doc: doc["target"]))
    for name in ("rouge1", "rougeL", "rougeL_coco", "bleu4", "bleu4_coco", "label_f1_micro_14", "entity_f1_simple"):
        assert scored.value(name) == pytest.approx(1, abs=1e-6), name
        assert scored.value(f"{name}_abnormal") == pytest.approx(1, abs=1e-6), name
    lifts = [name for name in scored.estimates if name.endswith("_lift")]
    assert {scored.value(name) for name in lifts if not math.isnan(scored.value(name))} == {0.0}


def test_scores_equal_those_of_independent_implementations(folder: Path, score: Callable[..., Any]) -> None:
    made = task(folder)
    texts = {doc["study_id"]: FINDINGS[(k * 7) % 3] for k, doc in enumerate(made.documents)}
    scored = score(made, writes(lambda doc: texts[doc["study_id"]]))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for part, chosen in (("", scored.documents), ("_abnormal", [d for d in scored.documents if d["abnormal"]])):
        generated, references = [texts[doc["study_id"]] for doc in chosen], [doc["target"] for doc in chosen]
        pairs = list(zip(references, generated, strict=True))
        rouge = np.mean([scorer.score(*pair)["rougeL"].fmeasure for pair in pairs])
        assert scored.value(f"rougeL{part}") == pytest.approx(rouge)
        assert scored.value(f"bleu4{part}") == pytest.approx(sacrebleu.corpus_bleu(generated, [references]).score / 100)
        assert scored.value(f"rougeL_coco{part}") == pytest.approx(coco_rouge_l(generated, references).mean())
        # Of cleaned texts of such length both conventions agree but for COCO's tiny constants.
        cleaned = [[clean_report(one) for one in side] for side in (generated, references)]
        coco = sacrebleu.corpus_bleu(cleaned[0], [cleaned[1]], tokenize="none", smooth_method="none").score / 100
        assert scored.value(f"bleu4_coco{part}") == pytest.approx(coco, rel=1e-6)
    modal = Counter(texts[doc["study_id"]] for doc in scored.documents).most_common(1)[0][1]
    assert scored.value("modal_share") == pytest.approx(modal / len(scored.documents))
    assert "13a" in scored.estimates["bleu4"].extra["computed_by"]
    assert "R2Gen" in scored.estimates["bleu4_coco"].extra["computed_by"]
    humans = Counter(doc["target"] for doc in scored.documents).most_common(1)[0][1]
    assert scored.details["modal_share_of_references"] == pytest.approx(humans / len(scored.documents))


def test_facts_are_held_against_the_whole_report(folder: Path, score: Callable[..., Any]) -> None:
    pneumonia = score(task(folder), writes(lambda doc: f"{doc['target']} Pneumonia."))
    studies = {study.study_id: study for study in read_dataset(folder).studies}
    unsupported = np.mean(["Pneumonia" not in studies[doc["study_id"]].impression for doc in pneumonia.documents])
    assert 0 < unsupported < 1
    assert pneumonia.value("unsupported_finding") == pytest.approx(unsupported)


def test_claims_of_an_earlier_study_that_there_is_not_are_a_rate(folder: Path, score: Callable[..., Any]) -> None:
    claim = "No interval change since the prior study."
    scored = score(task(folder), writes(lambda doc: f"{doc['target']} {claim}"))
    assert (scored.value("prior_without_prior"), scored.value("prior_without_prior_lift")) == (1, 1)
    assert scored.estimates["prior_without_prior"].n < len(scored.documents)  # some have an earlier study


def test_one_text_for_all_has_a_modal_share_of_one(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(task(folder), writes(lambda doc: "Clear  lungs." if doc["abnormal"] else "clear lungs."))
    assert (scored.value("modal_share"), scored.estimates["modal_share"].ci95) == (1, (1, 1))
    made = task(folder)
    assert "modal_share" in made.lower_is_better() and made.higher_is_better()["bleu4"]
    each = score(made, writes(lambda doc: doc["study_id"]))
    low, high = each.estimates["modal_share"].ci95
    assert low <= each.value("modal_share") <= high and each.value("modal_share") == 1 / len(each.documents)


def test_summaries_are_not_scored_by_what_is_for_reports() -> None:
    assert set(ReportScorer.metric_names()) - set(Summarization.SCORER.metric_names()) == {
        f"{name}{part}" for name in ("bleu4", "bleu4_coco", "rougeL_coco", "modal_share") for part in ("", "_abnormal")
    }


# --- floors


def test_floors_run_as_models_score_what_stands_beside_every_score(folder: Path, score: Callable[..., Any]) -> None:
    made = task(folder)
    train = Counter(s.findings for s in read_dataset(folder).studies if s.split == "train" and s.findings)
    texts = made.floors_of(made.documents[0])
    assert texts == {"constant": texts["constant"], "template": normal_report()}
    assert train[texts["constant"]] == max(train.values())
    by_kind = {kind: score(task(folder), BaselineBackend(kind=kind).generate_until) for kind in texts}  # type: ignore[arg-type]
    for name in ("rougeL", "bleu4_coco_abnormal", "modal_share", "rougeL_coco", "label_f1_macro_14"):
        floors = {kind: scored.value(name) for kind, scored in by_kind.items()}
        for scored in by_kind.values():
            assert scored.estimates[name].extra["floors"] == pytest.approx(floors), name
            assert scored.estimates[name].floor == pytest.approx(max(floors.values()))


def test_exemplars_are_the_train_images_and_stand_in_no_log(folder: Path) -> None:
    for images, views in (("frontal", {"a"}), ("all", {"a", "b", "lateral"})):
        made = task(folder, images=images)
        made.build_all_requests()
        exemplars = made.instances[0].arguments[0].exemplars
        assert exemplars is made.instances[-1].arguments[0].exemplars
        assert {one.image.path.stem.split("_")[1] for one in exemplars} == views
        train = {study.study_id: study for study in read_dataset(folder).studies if study.split == "train"}
        for one in exemplars:
            assert one.text == train[f"s{int(one.image.path.stem.split('_')[0]):02}"].findings
        assert FINDINGS[0] not in str(made.instances[0].arguments)


@pytest.mark.parametrize("kind", ["lead", "copy", "tfidf"])
def test_a_floor_that_the_task_has_not_is_refused_before_the_run(folder: Path, kind: Any) -> None:
    reason = unsupported_reason(BaselineBackend(kind=kind), task(folder))
    assert reason is not None and f"floor {kind}" in reason and "constant, neighbour, template" in reason
    assert unsupported_reason(BaselineBackend(kind="template"), task(folder)) is None
    assert unsupported_reason(BaselineBackend(kind="constant", text="Clear."), task(folder)) is None


def test_a_text_model_is_refused(folder: Path) -> None:
    text_only = type("TextOnly", (), {"CAPABILITIES": frozenset({"generate_until"}), "MULTIMODAL": False})()
    assert unsupported_reason(text_only, task(folder)) == "TextOnly cannot take images"


def test_without_train_findings_there_are_no_floors(
    write_set: Callable[..., Path], fake_image: Callable[..., Image], tmp_path: Path
) -> None:
    studies = [Study("a", "a", (fake_image("a.png"),), findings="Clear.", split="test")]
    made = task(write_set(tmp_path / "test_only", studies))
    with pytest.raises(UserError, match="in split train has findings"):
        made.floors_of(made.documents[0])


def test_a_split_without_such_studies_is_refused_with_counts(
    write_set: Callable[..., Path], fake_image: Callable[..., Image], tmp_path: Path
) -> None:
    studies = [
        Study("a", "a", (fake_image("a.png", "lateral"),), findings="Clear.", split="test"),
        Study("b", "b", (fake_image("b.png"),), split="test"),
    ]
    made = task(write_set(tmp_path / "halves", studies))
    with pytest.raises(UserError, match="findings in 1 and a frontal image in 1, never both"):
        _ = made.documents


# --- from end to end


def test_the_demo_runs_through_lm_eval(demo: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor as a model: its row equals the floor in the table; logged samples hold hashes alone."""
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    results = lm_eval.simple_evaluate(
        model="medvlm-baseline",
        model_args="kind=template",
        tasks=["demo_cxr_report_generation"],
        task_manager=TaskManager(metadata={"data_dir": str(demo.folder)}),
        limit=12,
    )
    block = results["medvlm"]["tasks"]["demo_cxr_report_generation"]
    for name in ("rougeL", "bleu4", "bleu4_coco", "rougeL_coco"):
        estimate = block["metrics"][name]
        assert estimate["value"] == pytest.approx(estimate["extra"]["floors"]["template"])
        assert results["results"]["demo_cxr_report_generation"][f"{name},none"] == estimate["value"]
    assert block["scored"] == 12 and block["template_version"] == 1
    assert len(results.scores) == 12 * len(ReportScorer.PER_STUDY)
    assert all(record["image"] for record in results.scores)
    logged = str([sample["arguments"] for sample in results["samples"]["demo_cxr_report_generation"]])
    assert str(demo.folder) not in logged and normal_report() not in logged
