from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness import plugin
from medvlm_harness.results.redaction import (
    HOME_PATHS,
    LOCAL,
    OPTIONS,
    REDACTED,
    SECRETS,
    is_redacted,
    redact,
    redact_options,
    redact_text,
    secrets_in,
)
from medvlm_harness.tracks.declarations import TRACKS

HF = "hf_" + "aB3" * 11  # of a token's shape, and none
EXAMPLES = {
    "a Hugging Face token": HF,
    "an API key": "sk-proj-" + "aB3" * 10,
    "a GitHub token": "ghp_" + "aB3" * 12,
    "a GitLab token": "glpat-" + "aB3" * 7,
    "an AWS key": "AKIA" + "A1B2" * 4,
    "a Google API key": "AIza" + "aB3" * 11 + "aB",
    "a Slack token": "xoxb-" + "123-" * 5 + "abc",
    "a JSON web token": "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    "an authorization header": "Bearer " + "aB3" * 8,
    "credentials in an address": "https://alice:s3cret@example.org/v1",
    "a secret by its name": "api_key=s3cret-word",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_of_secret_is_known_and_taken_out_wherever_it_stands(kind: str) -> None:
    secret = EXAMPLES[kind]
    value = {"a": [{"b": f"before {secret} after"}], f"name {secret}": 1}
    assert kind in secrets_in(value)
    redacted = redact_text(value)
    assert not secrets_in(redacted)
    assert redacted["a"][0]["b"].startswith("before ")
    assert redacted["a"][0]["b"].endswith(" after")
    assert REDACTED in redacted["a"][0]["b"]
    assert redact_text(redacted) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "gho_" + "aB3" * 12,
        "github_pat_" + "aB3" * 12,
        "ASIA" + "A1B2" * 4,
        "xoxp-" + "123-" * 5,
        "Authorization: Basic " + "aB3" * 8,
        "client_secret = s3cret-word",
        "AWS_SECRET_ACCESS_KEY=s3cret-word",
        '{"Password": "s3cret-word"}',
        "/srv/alice/weights",
        "C:/Users/alice/weights",
        "file:///home/alice/weights",
    ],
)
def test_other_spellings_are_known_too(text: str) -> None:
    redacted = redact_text(text)
    assert is_redacted(redacted)
    assert "alice" not in redacted
    assert "s3cret" not in redacted


@pytest.mark.parametrize(
    "text",
    [
        "No focal consolidation. Heart size is normal and/or unchanged; 3/4/5 cm, XXXX.",
        "eos_token = </s>, max_tokens=512, tokenizer: bert-base",
        "https://example.org/models/home/alice",
        "f5c88c5906795c0e33719e2f3aa219db680951744c789f50aecb7609adc80183",
        "org/name",
        "<image>\nFindings: {findings}",
        "a ratio of ~/2",
    ],
)
def test_what_is_neither_a_secret_nor_a_path_stays(text: str) -> None:
    assert redact_text(text) == text
    assert redact_options({"pretrained": text}) == {"pretrained": text} or "/" in text
    assert not is_redacted(text)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/alice/models/iu-clip-tiny", f"{LOCAL}iu-clip-tiny"),
        ("/Users/alice/w.safetensors", f"{LOCAL}w.safetensors"),
        (r"C:\Users\alice\models\w.pt", f"{LOCAL}w.pt"),
        ("~/w.pt", f"{LOCAL}w.pt"),
        ("/root/w.pt", f"{LOCAL}w.pt"),
        ("/home/alice", LOCAL),
        (f"/home/alice/{HF}", f"{LOCAL}{REDACTED}"),
    ],
)
def test_a_path_under_a_home_folder_keeps_its_last_component(path: str, shown: str) -> None:
    assert redact_text(path) == shown
    assert redact_text(f"loaded from {path}, then") == f"loaded from {shown}, then"
    assert redact_options(f"pretrained={path},seed=1") == f"pretrained={shown},seed=1"
    assert HOME_PATHS.search(path) or path == "/home/alice"
    assert not HOME_PATHS.search(shown)


def test_options_that_are_not_known_lose_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "w").touch()
    monkeypatch.chdir(tmp_path)
    options = {
        "pretrained": "mine/w",  # there is such a file: it is no name on the Hub
        "peft": "org/adapter",
        "encoder_args": "pretrained=/srv/alice/enc;quantization=int8",
        "base_url": "https://alice:pw@host/v1",
        "precision": "bf16",
        "seed": 3,
        "batch_size": None,
        "my_secret_option": 1234,
        "auth_token": "word",
        "chat_template_args": {"user": "alice"},
    }
    assert redact_options(options) == {
        **options,
        "pretrained": f"{LOCAL}w",
        "encoder_args": f"pretrained={LOCAL}enc;quantization=int8",
        "base_url": f"https://{REDACTED}@host/v1",
        "my_secret_option": REDACTED,
        "auth_token": REDACTED,
        "chat_template_args": REDACTED,
    }
    assert redact_options(f"pretrained=a/b,token={HF},x") == f"pretrained=a/b,token={REDACTED},{REDACTED}"


def test_results_are_cleaned_at_every_place_and_the_numbers_stay() -> None:
    results = {
        "results": {"t": {"auroc,none": 0.5, "auroc_stderr,none": "N/A"}},
        "config": {
            "model": "hf",
            "model_args": {"pretrained": "/data/x/m", "token": HF},
            "limit": 3,
            "use_cache": "/a/b/c",
        },
        "configs": {"t": {"metadata": {"version": 1, "api_key": "word", "config_source": "/home/alice/t.yaml"}}},
        "model_name": "/home/alice/m",
        "tokenizer_eos_token": ["</s>", "2"],
        "medvlm": {"model": {"card": {"summary": "see ~/notes.txt"}}, "hub_token": "word"},
    }
    before = json.dumps(results)
    redacted = redact(results)
    assert json.dumps(results) == before
    assert redacted == {
        "results": results["results"],
        "config": {
            "model": "hf",
            "model_args": {"pretrained": f"{LOCAL}m", "token": REDACTED},
            "limit": 3,
            "use_cache": f"{LOCAL}c",
        },
        "configs": {"t": {"metadata": {"version": 1, "api_key": REDACTED, "config_source": REDACTED}}},
        "model_name": f"{LOCAL}m",
        "tokenizer_eos_token": ["</s>", "2"],
        "medvlm": {"model": {"card": {"summary": f"see {LOCAL}notes.txt"}}, "hub_token": REDACTED},
    }
    assert redact(redacted) == redacted


def test_all_options_of_our_models_and_tasks_are_known() -> None:
    names: set[str] = set()
    for target in plugin.model_targets().values():
        names |= plugin.load_target(target).options()
    for name, module in TRACKS.items():
        names |= getattr(import_module(module), name).RUNTIME_KEYS
    assert names <= OPTIONS, f"does {sorted(names - OPTIONS)} say nothing but how a model was run?"


def test_a_run_writes_and_prints_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    """lm-eval's own tracker, with results as a stock model leaves them."""
    plugin.install()
    import lm_eval._cli.run as command
    import lm_eval.config.evaluate_config as config
    import lm_eval.evaluator as evaluator
    from lm_eval.loggers import EvaluationTracker

    from medvlm_harness.results.run import MedvlmResults

    home = tmp_path / "home" / "alice" / "weights"
    home.mkdir(parents=True)
    arguments = {"pretrained": str(home), "token": HF, "api_key": "word-of-mine"}
    results = MedvlmResults(
        results={}, configs={}, config={"model": "hf", "model_args": arguments}, medvlm={"model": {"card": None}}
    )
    results.scores = []
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    tracker.general_config_tracker.log_experiment_args("hf", arguments, None, None, False)
    tracker.save_results_aggregated(results=results, samples={})
    sample = {"arguments": [(f"asked with {HF}",)], "resps": [[f"/home/alice/x has no token: {HF}"]]}
    tracker.save_results_samples("t", [sample | {"filtered_resps": [str(home)], "target": "x", "doc": {"a": HF}}])
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".json", ".jsonl"}
    for path in written:
        text = path.read_text()
        assert HF not in text, path
        assert "word-of-mine" not in text, path
        assert "alice" not in f"{path.relative_to(tmp_path)} {text}", path
    (file,) = (tmp_path / "out" / "weights").glob("results_*.json")
    assert json.loads(file.read_text())["model_name"] == "weights"
    command.print(f"hf ({arguments}), limit: None")
    config.print(f"EvaluatorConfig(model='hf', hf_hub_log_args={{'token': '{HF}'}})")
    with caplog.at_level("INFO"):
        evaluator.eval_logger.info("Initializing %s model, with arguments: %s", "hf", arguments)
    for said in (capsys.readouterr().out, caplog.text):
        assert "'pretrained'" in said
        assert HF not in said
        assert "word-of-mine" not in said
