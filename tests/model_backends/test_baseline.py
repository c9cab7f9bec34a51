from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from sklearn.metrics import roc_auc_score

from medvlm_harness import plugin
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.retrieval import rank_queries, recall_at
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.requests import Generation, ImageRef, Label, LabelSet, PromptWithFloors, TextRef
from medvlm_harness.results.run import unsupported_reason

N = 40
REFS = [ImageRef(f"{k:064x}", Path("unused")) for k in range(N)]
LABELS = LabelSet("two", "multilabel", (Label("A", ("a",), ("no a",)), Label("B", ("b",), ("no b",))), (0.2, None))
VIEWS = LabelSet("views", "multiclass", (Label("frontal", ("f",)), Label("lateral", ("l",))), (0.75, 0.25))


def retrieval(kind: str, reports: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of one image and one report per study."""
    backend = BaselineBackend(kind=kind)  # type: ignore[arg-type]
    docs = [{"texts": {"report": str(TextRef(text))}} for text in reports]
    arguments = zip(docs, REFS, reports, strict=False)
    pairs = [(Instance("embed", d, (ref,), 0), Instance("embed", d, (TextRef(t),), 1)) for d, ref, t in arguments]
    images, texts = (np.stack([e.vector for e in backend.embed(list(side))]) for side in zip(*pairs, strict=True))
    return images, texts


def test_the_prior_answers_prevalence_and_scores_exactly_one_half(
    classify_requests: Callable[..., list[Instance]],
) -> None:
    scores = BaselineBackend().classify(classify_requests(REFS, LABELS))
    assert all(s.probability == pytest.approx((0.2, 0.5)) for s in scores)
    assert all(s.margin == pytest.approx((np.log(0.25), 0.0), abs=1e-12) for s in scores)
    y = np.arange(N) % 3 == 0
    assert roc_auc_score(y, [s.margin[0] for s in scores]) == 0.5
    for s in BaselineBackend().classify(classify_requests(REFS, VIEWS)):
        assert s.probability == pytest.approx((0.75, 0.25))


@pytest.mark.parametrize("k", [1, 5, 10])
def test_the_prior_retrieves_at_exactly_chance(k: int) -> None:
    images, texts = retrieval("prior", [f"report {n}" for n in range(N)])
    ranked = rank_queries(images, texts, np.arange(N), np.arange(N))
    assert np.allclose(recall_at(ranked, k), k / N, rtol=0, atol=1e-12)


def test_the_oracle_is_always_right(classify_requests: Callable[..., list[Instance]]) -> None:
    y = (np.arange(N) % 4 == 0).astype(int)
    docs = [{"target": [int(value), None]} for value in y]
    scores = BaselineBackend(kind="oracle").classify(classify_requests(REFS, LABELS, docs))
    assert roc_auc_score(y, [s.margin[0] for s in scores]) == 1.0
    assert {s.probability[1] for s in scores} == {0.5}
    assert all(np.isfinite(s.margin).all() for s in scores)
    docs = [{"target": [int(value), 1 - int(value)]} for value in y]
    scores = BaselineBackend(kind="oracle").classify(classify_requests(REFS, VIEWS, docs))
    assert [int(np.argmax(s.probability)) for s in scores] == (1 - y).tolist()
    assert all(sum(s.probability) == pytest.approx(1) for s in scores)


def test_the_oracle_finds_what_can_be_told_apart() -> None:
    reports = [f"report {n // 2}" for n in range(N)]  # each twice
    images, texts = retrieval("oracle", reports)
    classes = np.arange(N) // 2
    assert recall_at(rank_queries(images, texts, classes, classes), 1).min() == 1.0
    strict = rank_queries(images, texts, np.arange(N), np.arange(N))
    assert np.allclose(recall_at(strict, 1), 0.5)


@pytest.mark.parametrize("labels", [LABELS, VIEWS])
def test_noise_depends_on_the_input_and_the_seed_alone(
    classify_requests: Callable[..., list[Instance]], labels: LabelSet
) -> None:
    requests = classify_requests(REFS, labels)
    first = BaselineBackend(kind="random", seed=3).classify(requests)
    again = BaselineBackend(kind="random", seed=3, batch_size=1).classify(requests[::-1])[::-1]
    other = BaselineBackend(kind="random", seed=4).classify(requests)
    assert first == again
    assert first != other
    assert len(set(first)) == N
    images, texts = retrieval("random", [f"report {n}" for n in range(N)])
    assert np.allclose(np.linalg.norm([*images, *texts], axis=1), 1, atol=1e-6)
    assert len({v.tobytes() for v in (*images, *texts)}) == 2 * N


def test_vectors_of_equal_texts_are_equal_bytes() -> None:
    _, texts = retrieval("random", ["same", "same", "other"])
    assert texts[0].tobytes() == texts[1].tobytes() != texts[2].tobytes()


def test_texts_are_never_cut_and_images_do_not_say(embed_requests: Callable[..., list[Instance]]) -> None:
    answers = BaselineBackend().embed(embed_requests([REFS[0], TextRef("report")]))
    assert [e.truncated for e in answers] == [None, False]


def test_an_unknown_kind_names_the_near_one() -> None:
    with pytest.raises(UserError, match=r"'oracel'.*Did you mean oracle\?"):
        BaselineBackend(kind="oracel")  # type: ignore[arg-type]


def test_what_it_cannot_do_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"cannot answer `generate_until` requests: kind=prior writes nothing"):
        BaselineBackend().generate_until([])


def test_the_oracle_knows_nothing_of_an_image_that_is_not_the_documents_own(
    classify_requests: Callable[..., list[Instance]],
) -> None:
    docs = [{"target": [1, 0], "image": str(ref)} for ref in REFS]
    own = BaselineBackend(kind="oracle").classify(classify_requests(REFS, LABELS, docs))
    other = BaselineBackend(kind="oracle").classify(classify_requests(REFS[::-1], LABELS, docs))
    assert {s.probability for s in own} == {(1 - 1e-6, 1e-6)}
    assert {s.probability for s in other} == {(0.5, 0.5)}


@pytest.mark.parametrize("kind", ["prior", "random", "oracle"])
def test_an_indication_changes_nothing(kind: Any) -> None:
    doc = {"target": [1, None]}
    plain = Instance("classify", doc, (REFS[0], LABELS), 0)
    told = Instance("classify", doc, (REFS[0], LABELS, TextRef("Cough.")), 0)
    backend = BaselineBackend(kind=kind)
    assert backend.classify([plain]) == backend.classify([told])


# --- texts

FLOORS = {
    "constant": "No acute disease.",
    "template": "Clear lungs.",
    "lead": "The heart is large.",
    "copy": "The heart is large. No effusion.",
}


def writing(arguments: list[Any], doc: dict[str, Any] | None = None) -> list[Instance]:
    return [
        Instance("generate_until", doc or {}, (one, {"until": ["."], "max_gen_toks": 1}), 0, ("a_task", k, 1))
        for k, one in enumerate(arguments)
    ]


@pytest.mark.parametrize("kind", sorted(FLOORS))
def test_a_floor_writes_what_the_task_hands_over_for_it(kind: Any) -> None:
    backend = BaselineBackend(kind=kind)
    beside = backend.generate_until(writing([PromptWithFloors("Summarise: ...", FLOORS)]))
    in_document = backend.generate_until(writing(["Summarise: ..."], {"floors": FLOORS}))
    assert beside == in_document == [FLOORS[kind]]
    assert all(isinstance(text, Generation) and text.finished for text in beside)


def test_a_stock_task_hands_its_floors_over_in_its_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "summary.yaml").write_text(
        "task: summary\noutput_type: generate_until\ncustom_dataset: !function data.documents\ntest_split: test\n"
        'doc_to_text: "Summarise: {{findings}}"\ndoc_to_target: "{{impression}}"\n'
        "generation_kwargs: {until: []}\nmetric_list: [{metric: exact_match}]\nmetadata: {version: 1.0}\n"
    )
    (tmp_path / "data.py").write_text(
        "from datasets import Dataset\n\n"
        "def documents(**options):\n"
        "    rows = [{'findings': f'finding {k}', 'impression': f'finding {k % 2}', 'floors': "
        "{'constant': 'finding 0', 'copy': f'finding {k}'}} for k in range(6)]\n"
        "    return {'test': Dataset.from_list(rows)}\n"
    )
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    for kind, expected in (("constant", 1 / 2), ("copy", 1 / 3)):
        results = lm_eval.simple_evaluate(
            model="medvlm-baseline",
            model_args=f"kind={kind}",
            tasks=["summary"],
            task_manager=TaskManager(include_path=str(tmp_path)),
            bootstrap_iters=0,
        )
        assert results["results"]["summary"]["exact_match,none"] == pytest.approx(expected)


def test_a_text_of_ones_own_needs_nothing_from_the_task() -> None:
    assert BaselineBackend(kind="constant", text="Stable.").generate_until(writing(["a", "b"])) == ["Stable."] * 2
    assert BaselineBackend(kind="constant", text="Stable.").describe()["text"] == "Stable."


@pytest.mark.parametrize("doc", [{}, {"floors": None}, {"floors": "x"}, {"floors": {**FLOORS, "tfidf": None}}])
def test_a_task_that_hands_over_no_such_text_is_named(doc: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"Task a_task hands over no text for kind=tfidf"):
        BaselineBackend(kind="tfidf").generate_until(writing(["a"], doc))


def test_without_a_text_the_way_to_give_one_is_named() -> None:
    with pytest.raises(UserError, match=r"\(it has none\): add text="):
        BaselineBackend(kind="constant").generate_until(writing(["a"]))
    with pytest.raises(UserError, match="text= with kind=constant alone"):
        BaselineBackend(kind="lead", text="x")


@pytest.mark.parametrize(
    ("kind", "need", "reason"),
    [
        (
            "prior",
            "generate_until",
            "kind=prior writes nothing; use kind=constant, template, lead, copy, tfidf, neighbour",
        ),
        ("copy", "classify:image", "kind=copy writes texts; use kind=prior, random, oracle"),
        ("copy", "generate_until", None),
        ("prior", "classify:text", None),
    ],
)
def test_a_kind_does_its_own_tasks_alone_and_says_why(kind: Any, need: str, reason: str | None) -> None:
    task = SimpleNamespace(is_medvlm=True, needs=lambda lm: frozenset({need}), refuses=lambda lm: None)
    found = unsupported_reason(BaselineBackend(kind=kind), task)
    assert found is None if reason is None else found is not None and found.endswith(reason)


def test_the_prior_of_texts_is_that_of_images(classify_requests: Callable[..., list[Instance]]) -> None:
    texts: list[Any] = [TextRef(f"report {k}") for k in range(3)]
    scores = BaselineBackend().classify(classify_requests(texts, LABELS))
    assert all(s.probability == pytest.approx((0.2, 0.5)) for s in scores)
