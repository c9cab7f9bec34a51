from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import Generation, PromptWithFloors
from medvlm_harness.tracks.generation import FilteredText, GenerationTask, TextRow

PROMPT = "Findings: {findings}\nImpression:"
TWO_FILTERS = [
    {"name": "none", "filter": [{"function": "take_first"}]},
    {"name": "no_prior", "filter": [{"function": "drop_prior_claims"}, {"function": "take_first"}]},
]


class Length(GenerationTask):
    """The mean length of what was written."""

    def make_documents(self) -> Iterator[dict[str, Any]]:
        for study in self.studies:
            yield self.document(study, source=study.findings, target=study.impression)

    def floors_of(self, doc: Any) -> dict[str, str]:
        return {"copy": doc["source"]}

    def metric_names(self) -> tuple[str, ...]:
        return ("length",)

    def estimate(self, rows: Any) -> dict[str, Estimate]:
        mean = sum(len(row.text) for row in rows) / len(rows)
        return {"length": Estimate(mean, 0.0, (mean, mean), len(rows))}

    def score_records(self, rows: Any) -> Iterator[dict[str, Any]]:
        yield from ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    studies = [
        Study(f"s{k}", f"p{k}", findings=f"Lungs {k} {{clear}}.", impression=f"Normal {k}.", split="test")
        for k in range(4)
    ]
    return write_set(tmp_path_factory.mktemp("generation") / "set", studies)


def task(folder: Path, **config: Any) -> Length:
    metadata = {"version": 1, "data_dir": str(folder)}
    return Length({"task": "g", "dataset": "synthetic", "prompt": PROMPT, **config, "metadata": metadata})


def copied(value: Any) -> Any:
    """As another process gets it."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301  # our own


def answered(made: Length, texts: list[str]) -> None:
    for instance, text in zip(made.instances, texts, strict=True):
        instance.resps.append(text)
    made.apply_filters()


def test_the_prompt_is_filled_and_floors_stand_beside_it(folder: Path) -> None:
    made = task(folder, generation_kwargs={"until": ["\n"], "max_gen_toks": 8})
    made.build_all_requests()
    first = made.instances[0]
    assert first.request_type == "generate_until"
    prompt, options = first.arguments
    assert prompt == "Findings: Lungs 0 {clear}.\nImpression:"
    assert options == {"until": ["\n"], "max_gen_toks": 8}
    assert isinstance(prompt, PromptWithFloors)
    assert prompt.floors == {"copy": "Lungs 0 {clear}."}


def test_no_request_shares_its_options_with_another(folder: Path) -> None:
    """Stock backends take keys out of them."""
    made = task(folder, generation_kwargs={"until": ["\n"]})
    made.build_all_requests()
    made.instances[0].arguments[1].pop("until")
    assert made.instances[1].arguments[1] == {"until": ["\n"]}


def test_gen_kwargs_of_the_command_line_go_over_those_of_the_yaml(folder: Path) -> None:
    made = task(folder, generation_kwargs={"until": ["\n"], "max_gen_toks": 8})
    made.set_config(key="generation_kwargs", value={"max_gen_toks": 16}, update=True)  # as lm-eval does
    made.build_all_requests()
    assert made.instances[0].arguments[1] == {"until": ["\n"], "max_gen_toks": 16}
    assert made.details()["generation_kwargs"] == {"until": ["\n"], "max_gen_toks": 16}


def test_a_chat_template_and_a_system_instruction_are_applied(folder: Path) -> None:
    made = task(folder)
    seen = []

    def template(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        seen.append((messages, add_generation_prompt))
        return f"<user>{messages[-1]['content']}<model>"

    made.build_all_requests(chat_template=template, system_instruction="Be brief.", apply_chat_template=True)
    assert made.instances[0].arguments[0] == "<user>Findings: Lungs 0 {clear}.\nImpression:<model>"
    assert made.instances[0].arguments[0].floors == {"copy": "Lungs 0 {clear}."}
    messages, generates = seen[0]
    assert [message["role"] for message in messages] == ["system", "user"]
    assert generates
    made.build_all_requests(system_instruction="Be brief.")
    assert made.instances[0].arguments[0].startswith("Be brief.\n\nFindings: ")
    made.build_all_requests()
    assert made.instances[0].arguments[0].startswith("Findings: ")


def test_each_filter_pipeline_has_estimates_of_its_own(folder: Path) -> None:
    made = task(folder, filter_list=TWO_FILTERS)
    made.build_all_requests()
    claim = "Unchanged since the prior study."
    answered(made, [Generation(f" Clear. {claim}", finished=True), "Clear.", "", claim])
    values = {}
    for name in ("none", "no_prior"):
        rows = [
            made.process_results(instance.doc, [instance.filtered_resps[name]])["length"] for instance in made.instances
        ]
        assert {row.filter for row in rows} == {name}
        values[name] = made.aggregation()["length"](rows)
    assert values == {"none": (6 + 1 + len(claim) + 6 + len(claim)) / 4, "no_prior": 12 / 4}
    assert {name: one.value for name, one in made.all_estimates().items()} == {
        "length": values["none"],
        "length,no_prior": values["no_prior"],
    }
    assert [row.text for row in made.rows] == [f"Clear. {claim}", "Clear.", "", claim]
    assert made.details()["filters"] == ["none", "no_prior"]


def test_whether_a_text_was_finished_goes_through_filters_and_processes(folder: Path) -> None:
    made = task(folder, filter_list=TWO_FILTERS)
    made.build_all_requests()
    answered(made, [Generation("a", finished=False), Generation("b", finished=True), "c", "d"])
    filtered = [copied(instance.filtered_resps["no_prior"]) for instance in made.instances]
    assert all(isinstance(text, FilteredText) and text.pipeline == "no_prior" for text in filtered)
    rows = [made.make_row(i.doc, [text]) for i, text in zip(made.instances, filtered, strict=True)]
    assert [row.finished for row in rows] == [False, True, None, None]
    assert copied(rows) == rows
    assert isinstance(rows[0], TextRow)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prompt": None}, "expected `prompt:` to be a text, but got None"),
        ({"prompt": " "}, "expected `prompt:` to be a text"),
        ({"prompt": "{finding}"}, r"the prompt asks for \{finding\}.*Did you mean .*findings"),
        ({"prompt": "{findings.__class__}"}, "the prompt asks for"),
        ({"prompt": "{}"}, "the prompt asks for"),
        ({"prompt": "{findings"}, "braces do not match"),
        ({"generation_kwargs": ["until"]}, "expected generation_kwargs to be a mapping"),
        ({"filter_list": {}}, "expected filter_list to be a list"),
        ({"filter_list": [{"name": "a", "filter": []}]}, "a name and a filter"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "take_first"}], "extra": 1}]}, "a name and a filter"),
        (
            {"filter_list": [{"name": "a", "filter": [{"function": "drop_priors"}]}]},
            "filter that lm-eval does not know",
        ),
        ({"filter_list": TWO_FILTERS[:1] * 2}, "each name in filter_list once"),
        ({"promt": "x"}, "unknown key 'promt'.*Did you mean .*prompt"),
    ],
)
def test_a_wrong_declaration_is_refused(folder: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(folder, **config)
