"""`medvlm push` as it is typed, against a Hub on this machine; and what must never get through, by name."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from medvlm_harness.cli import main
from medvlm_harness.results.publishing.hub import Hub

REPO = "acme/results"
SENTENCE = "There is a small calcified granuloma in the left upper lobe unchanged from before."
SECRET = "hf_" + "aBcDeFgHiJkLmNoPqRsT"
EVIL = "<script>alert(1)</script> | [x](javascript:alert(1)) ![y](http://evil.example/z.png) **b**"


PLAIN_TAGS = {
    *("h1", "h2", "p", "ul", "li", "a", "img", "strong", "code", "pre", "blockquote", "br"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def push(
    request: pytest.FixtureRequest,
    fake_hub: Any,
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """The command in this process, with a client that waits for nothing; plots are drawn where a test asks for them."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("medvlm_harness.results.publishing.release._plots", lambda section: ())

    def client(endpoint: str | None, timeout: float) -> Hub:
        from huggingface_hub import get_token

        return Hub(endpoint or fake_hub.url, get_token(), timeout=timeout, waits=(1.0,), sleep=told.waits.append)

    monkeypatch.setattr("medvlm_harness.cli.push._hub", client)
    monkeypatch.setenv("MEDVLM_DEBUG", "0")

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["medvlm", "push", *map(str, arguments), "--repo", REPO])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def plots() -> None:
    """Asks for plots, half of a push's time."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sent(hub: Any) -> dict[str, bytes]:
    """All that any commit or pull request ever brought."""
    made = [one for repo in hub.repos.values() for one in (*repo.commits, *repo.requests)]
    return {path: data for one in made for path, data in one["files"].items()}


# --- the way it should go


def test_without_yes_everything_is_shown_and_nothing_is_asked_of_the_hub(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path, tmp_path: Path
) -> None:
    status, out, err = push(run_file, "--stage", tmp_path / "stage")
    assert (status, err) == (0, "")
    assert fake_hub.log == []
    staged = files_of(tmp_path / "stage")
    for path, data in staged.items():
        assert any(line.split() == [f"{len(data):,}", path] for line in out.splitlines()), path
    assert "private" in out
    assert "cc-by-4.0" in out
    assert "--yes" in out
    assert f"card: {tmp_path / 'stage'}" in out


def test_one_commit_holds_results_tables_plots_card_and_readme(
    plots: None, push: Callable[..., Outcome], fake_hub: Any, run_file: Path
) -> None:
    before = files_of(run_file.parent)
    status, out, _ = push(run_file, "--yes", "--licence", "cc0-1.0", "--message", "mine")
    assert status == 0
    assert "pushed in one commit" in out
    (commit,) = fake_hub.results.commits
    assert commit["title"] == "mine"
    assert fake_hub.results.private
    names = {path.rpartition("/")[2]: path for path in commit["files"]}
    assert {"README.md", "results.json", "card.md", "summary.json"} <= set(names)
    assert {"results.parquet", "per_label.parquet", "subgroups.parquet"} <= set(names)
    folder = names["card.md"].rpartition("/")[0]
    assert folder.startswith("runs/medvlm-baseline") or folder.startswith("runs/random")
    pictures = [path for path in commit["files"] if path.endswith(".png")]
    assert pictures
    for path in pictures:
        assert Image.open(io.BytesIO(commit["files"][path])).size[0] > 100
        assert path.removesuffix(".png") + ".csv" in commit["files"]
        assert f"plots/{path.rpartition('/')[2]}" in commit["files"][names["card.md"]].decode()
    table = pq.read_table(io.BytesIO(commit["files"][names["results.parquet"]])).to_pylist()
    (auroc,) = [row for row in table if row["metric"] == "auroc"]
    (task,) = json.loads(run_file.read_text())["medvlm"]["tasks"].values()
    assert (auroc["value"], auroc["n"], auroc["run"]) == (task["metrics"]["auroc"]["value"], 120, folder)
    front = yaml.safe_load(commit["files"]["README.md"].decode().split("---\n")[1])
    assert front["license"] == "cc0-1.0"
    assert {one["config_name"] for one in front["configs"]} >= {"results", "per_label", "subgroups"}
    # The run itself is as it was.
    assert files_of(run_file.parent) == before


def test_no_id_no_text_and_no_small_count_is_in_what_was_sent(
    plots: None, push: Callable[..., Outcome], fake_hub: Any, run_file: Path
) -> None:
    assert push(run_file, "--yes").status == 0
    for path, data in sent(fake_hub).items():
        text = data.decode("utf-8", "replace")
        assert "granuloma" not in text, path
        assert "study0" not in text, path
        assert "patient0" not in text, path
        assert str(run_file.parent) not in text, path
    (card,) = [data.decode() for path, data in sent(fake_hub).items() if path.endswith("card.md")]
    assert "not for clinical use" in card
    assert "withheld" in card or "below 10" in card


def test_samples_are_hashed(push: Callable[..., Outcome], fake_hub: Any, run_file: Path) -> None:
    assert push(run_file, "--yes", "--samples").status == 0
    (scores,) = [data for path, data in sent(fake_hub).items() if path.endswith("scores.parquet")]
    table = pq.read_table(io.BytesIO(scores))
    assert table.num_rows > 100
    assert not any("study" in value for value in table.column("study").to_pylist())
    (card,) = [data.decode() for path, data in sent(fake_hub).items() if path.endswith("card.md")]
    assert "under salted hashes; such counts can be made from them again" in card


def test_the_same_again_sends_nothing(push: Callable[..., Outcome], fake_hub: Any, run_file: Path) -> None:
    push(run_file, "--yes")
    status, out, _ = push(run_file, "--yes")
    assert status == 0
    assert "nothing was sent" in out
    assert len(fake_hub.results.commits) == 1


def test_samples_can_be_added_to_a_run_that_is_there(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path
) -> None:
    push(run_file, "--yes")
    assert push(run_file, "--yes", "--samples").status == 0
    assert any(path.endswith("scores.parquet") for path in fake_hub.results.files)
    assert fake_hub.results.files["README.md"].decode().count("card.md") == 1
    # Once is enough: with another salt the same studies would have two names.
    assert "nothing was sent" in push(run_file, "--yes", "--samples").out


def other_run(change: Callable[..., Path]) -> Path:
    """The same with another name of the model."""

    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["model"]["card"]["name"] = "other"

    return change(edit)


def test_runs_of_parallel_pushers_are_both_there_and_in_the_readme(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path, finished: Path, change: Callable[..., Path]
) -> None:
    (first,) = (finished / "out").rglob("results_*.json")
    other = other_run(change)
    fake_hub.before_commit.append(lambda: _push_first(fake_hub, first))
    assert push(other, "--yes", "--force").status == 0
    assert len(fake_hub.results.commits) == 2
    cards = [path for path in fake_hub.results.files if path.endswith("card.md")]
    assert len(cards) == 2
    readme = fake_hub.results.files["README.md"].decode()
    assert all(path in readme for path in cards)


def _push_first(fake_hub: Any, path: Path) -> None:
    """What somebody else does meanwhile."""
    from medvlm_harness.cli.push import _build
    from medvlm_harness.results.publishing.outgoing import only_run, prepare_releases

    hub = Hub(fake_hub.url, "hf_thisIsATestToken0")
    releases = prepare_releases([only_run(path)], data_dir=None, samples=False, force=False)
    hub.publish(REPO, public=False, build=_build(hub, releases, REPO, None), message="theirs")


def test_what_people_wrote_into_the_readme_stays(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path, change: Callable[..., Path]
) -> None:
    push(run_file, "--yes")
    readme = fake_hub.results.files["README.md"].decode()
    own = readme.replace("license: cc-by-4.0", "license: cc-by-sa-4.0\nextra: kept")
    own = own.replace("\n<!--", "\nOurs.\n\n<!--", 1)
    fake_hub.results.files["README.md"] = (own + "\nBelow.\n").encode()
    assert push(other_run(change), "--yes", "--force").status == 0
    after = fake_hub.results.files["README.md"].decode()
    assert "\nOurs.\n" in after
    assert after.endswith("\nBelow.\n")
    front = yaml.safe_load(after.split("---\n")[1])
    assert (front["license"], front["extra"]) == ("cc-by-sa-4.0", "kept")


def test_one_licence_for_all_results_of_a_repo(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path, change: Callable[..., Path]
) -> None:
    push(run_file, "--yes", "--licence", "cc0-1.0")
    status, _, err = push(other_run(change), "--yes", "--force", "--licence", "mit")
    assert status == 2
    assert "under cc0-1.0, but --licence says mit" in err
    assert len(fake_hub.results.commits) == 1


def test_a_repo_with_a_readme_of_its_own_is_refused(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path
) -> None:
    push(run_file, "--yes")
    fake_hub.results.files = {"README.md": b"# Somebody's data\n"}
    status, _, err = push(run_file, "--yes")
    assert status == 2
    assert "did not write" in err
    assert len(fake_hub.results.commits) == 1


# --- the model's page


@pytest.mark.parametrize("index", [False, True])
def test_a_pull_request_beside_the_push(
    push: Callable[..., Outcome], fake_hub: Any, model_repo: Any, run_file: Path, index: bool
) -> None:
    model_repo.files["README.md"] = b"---\nlicense: mit\n---\n# Theirs\n"
    options = ["--model-card", "acme/model", "--benchmark", "acme/synthetic", *(["--model-index"] if index else [])]
    shown = push(run_file, *options)
    assert "syn_zeroshot.auroc" in shown.out
    assert model_repo.requests == []
    status, out, _ = push(run_file, "--yes", *options)
    assert status == 0
    (request,) = model_repo.requests
    assert list(request["files"]) == ["README.md" if index else ".eval_results/medvlm-synthetic.yaml"]
    assert model_repo.commits == []
    assert "pull request: http" in out


@pytest.mark.parametrize(("part", "status"), [("models/acme/model/commit", 403), ("models/acme/model", 500)])
def test_a_pull_request_that_fails_says_that_the_results_are_there(
    push: Callable[..., Outcome], fake_hub: Any, model_repo: Any, run_file: Path, part: str, status: int
) -> None:
    fake_hub.fail(part, status)
    done = push(run_file, "--yes", "--model-card", "acme/model", "--benchmark", "acme/synthetic")
    assert done.status == 1
    assert "The results were pushed, but no pull request was opened" in done.err
    assert "othing was pushed" not in done.err
    assert len(fake_hub.results.commits) == 1
    assert model_repo.requests == []


def test_options_of_a_model_card_without_one(push: Callable[..., Outcome], run_file: Path) -> None:
    status, _, err = push(run_file, "--model-index")
    assert status == 2
    assert "--model-card" in err


# --- when the Hub does not


@pytest.mark.parametrize("failure", [401, 403, 500, 503])
def test_a_hub_that_fails_ends_with_status_1_and_the_run_as_it_was(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path, failure: int
) -> None:
    before = files_of(run_file.parent)
    fake_hub.fail("/commit", failure)
    status, out, err = push(run_file, "--yes")
    assert status == 1
    assert "pushed in" not in out
    assert "othing was pushed" in err.splitlines()[-1]
    assert files_of(run_file.parent) == before
    assert sent(fake_hub) == {}


def test_a_hub_that_is_down_ends_with_status_1(push: Callable[..., Outcome], run_file: Path) -> None:
    status, _, err = push(run_file, "--yes", "--endpoint", "http://127.0.0.1:9", "--timeout", "1")
    assert status == 1
    assert "gave no answer" in err


def test_without_a_token_nothing_is_tried(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    status, _, err = push(run_file, "--yes")
    assert status == 2
    assert "hf auth login" in err
    assert fake_hub.log == []


# --- what must not get through


def refused(push: Callable[..., Outcome], fake_hub: Any, *arguments: str | Path) -> str:
    """The one line of a push that was refused before the Hub heard of it."""
    status, _, err = push(*arguments, "--yes")
    assert status == 2
    assert sent(fake_hub) == {}
    assert "Traceback" not in err
    assert SECRET not in err
    return err


def test_a_token_in_model_args_is_taken_out_and_does_not_go_out(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path]
) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["config"]["model_args"] = {"pretrained": "/home/alice/weights", "token": SECRET}

    assert push(change(edit), "--yes", "--force").status == 0
    everything = b"".join(sent(fake_hub).values())
    assert SECRET.encode() not in everything
    assert b"alice" not in everything


def test_a_token_where_nobody_looks_for_one_stops_the_push(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should redaction ever fail, the scan does not."""
    monkeypatch.setattr("medvlm_harness.results.publishing.public.redact", dict)

    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["metrics"]["brier"]["method"] = f"with {SECRET}"

    error = refused(push, fake_hub, change(edit), "--force")
    assert "a Hugging Face token" in error
    assert "results.json" in error


@pytest.mark.parametrize("words", [SENTENCE, SENTENCE.upper().replace(" ", "\n"), "heart size is normal today"])
def test_a_report_sentence_in_the_results_stops_the_push(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path], words: str
) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["prompt"] = f"Answer like this: {words} Thank you."

    error = refused(push, fake_hub, change(edit), "--force")
    assert "words of a report" in error
    assert "granuloma" not in error


def test_a_report_sentence_in_a_sample_stops_the_push_where_the_data_itself_is_away(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "The patient from room seven has a very large heart today."

    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["prompt"] = said

    path = change(edit)
    (samples,) = path.parent.glob("samples_*.jsonl")
    monkeypatch.delenv("MEDVLM_DATA")
    assert push(path, "--force").status == 0  # nobody has said it
    lines = samples.read_text().splitlines()
    first = json.loads(lines[0])
    first["resps"] = [[said]]
    samples.write_text("\n".join([json.dumps(first), *lines[1:]]))
    assert "words of a report or of a model's answer" in refused(push, fake_hub, path, "--force")


def test_where_no_reports_are_at_hand_the_push_is_refused_and_forced_it_is_marked(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.delenv("MEDVLM_DATA")
    for samples in run_file.parent.glob("samples_*"):
        samples.unlink()
    assert "--data-dir" in refused(push, fake_hub, run_file)
    assert push(run_file, "--data-dir", finished / "data", "--force").status == 0
    assert push(run_file, "--yes", "--force").status == 0
    (card,) = [data.decode() for path, data in sent(fake_hub).items() if path.endswith("card.md")]
    assert "no reports of synthetic were at hand" in card


def test_html_and_markdown_in_names_are_shown_as_they_are(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path]
) -> None:
    def edit(results: dict[str, Any]) -> None:
        block = results["medvlm"]
        block["model"]["card"] |= {"name": EVIL, "licence": EVIL, "summary": EVIL}
        block["tasks"]["syn_zeroshot"]["dataset"] |= {"name": "synthetic", "licence": EVIL}
        block["tasks"]["syn_zeroshot"]["prompt"] = f"{EVIL}\n# {EVIL}\n\n- {EVIL}"
        block["tasks"]["syn_zeroshot"]["metrics"]["brier"]["reason"] = EVIL

    assert push(change(edit), "--yes", "--force").status == 0
    pages = {path: data.decode() for path, data in sent(fake_hub).items() if path.endswith(".md")}
    assert len(pages) == 2
    for path, page in pages.items():
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(page.partition("\n---\n")[2] or page)
        tags = re.findall(r"<(?!!--)/?([a-z0-9]+)", html)
        assert set(tags) <= PLAIN_TAGS, path
        targets = re.findall(r'(?:href|src)="([^"]*)"', html)
        assert all(target.startswith(("runs/", "plots/")) for target in targets), path
        assert "alert(1)" in html  # shown, as text
    assert not any("<" in path or "|" in path or ".." in path for path in sent(fake_hub))


def test_nan_in_a_metric_is_refused_even_when_forced(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path]
) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["metrics"]["auroc"]["value"] = float("nan")

    path = change(edit)
    assert "NaN" in path.read_text()
    error = refused(push, fake_hub, path, "--force")
    assert "auroc" in error


def test_a_headline_without_a_value_is_refused_and_forced_it_is_marked(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path]
) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["metrics"]["auroc"] |= {
            **{"value": None, "stderr": None, "ci95": None, "reason": "the model answered nothing"}
        }

    path = change(edit)
    assert "syn_zeroshot has no auroc: the model answered nothing" in refused(push, fake_hub, path)
    assert push(path, "--yes", "--force").status == 0
    (card,) = [data.decode() for name, data in sent(fake_hub).items() if name.endswith("card.md")]
    assert "Published all the same" in card


def test_a_run_folder_edited_by_hand_is_refused_and_forced_it_is_marked(
    push: Callable[..., Outcome], fake_hub: Any, run_file: Path
) -> None:
    results = json.loads(run_file.read_text())
    results["medvlm"]["tasks"]["syn_zeroshot"]["metrics"]["auroc"]["value"] = 0.99
    run_file.write_text(json.dumps(results))
    error = refused(push, fake_hub, run_file)
    assert "changed after the run" in error
    assert "auroc" in error
    assert push(run_file, "--yes", "--force").status == 0
    readme = fake_hub.results.files["README.md"].decode()
    assert "changed after the run" in readme


def test_a_limited_run_is_refused_and_forced_it_is_marked(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path]
) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["config"]["limit"] = 8.0

    path = change(edit)
    assert "a limited run (--limit 8)" in refused(push, fake_hub, path)
    assert push(path, "--yes", "--force").status == 0
    (card,) = [data.decode() for name, data in sent(fake_hub).items() if name.endswith("card.md")]
    assert "a limited run" in card


def test_samples_of_data_that_shares_aggregates_alone_are_refused(
    push: Callable[..., Outcome], fake_hub: Any, change: Callable[..., Path]
) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["dataset"]["sharing"] = "aggregate"

    path = change(edit)
    assert "may not be shared by study" in refused(push, fake_hub, path, "--samples", "--force")
    assert push(path, "--yes", "--force").status == 0


def test_a_summary_that_somebody_broke_is_named(push: Callable[..., Outcome], fake_hub: Any, run_file: Path) -> None:
    push(run_file, "--yes")
    fake_hub.results.files = {"runs/a/b/summary.json": b'{"run": "elsewhere"}'}
    status, _, err = push(run_file, "--yes")
    assert status == 2
    assert "runs/a/b/summary.json" in err


def test_a_folder_with_several_runs_says_so(push: Callable[..., Outcome], run_file: Path) -> None:
    copy = run_file.with_name("results_2026-01-01T00-00-00.000001.json")
    copy.write_bytes(run_file.read_bytes())
    status, _, err = push(run_file.parent)
    assert status == 2
    assert "it holds 2" in err


# --- as it is installed


def test_the_installed_command_with_the_variables_of_huggingface_hub(
    fake_hub: Any, run_file: Path, finished: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "hf"), "MEDVLM_DATA": str(finished / "data")}
    program = Path(sys.executable).parent / "medvlm"
    command = [program, "push", run_file.parent, "--repo", REPO, "--public", "--yes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not fake_hub.results.private
    assert len(fake_hub.results.commits) == 1
