"""Data that may not be sent to others is not, whatever model is asked; where it was allowed, the result says so."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM, CachingLM
from lm_eval.models import MODEL_MAPPING
from lm_eval.models.dummy import DummyLM

from medvlm_harness import plugin
from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.results.remote import refuse_hub_push, refuse_remote, remote_host
from medvlm_harness.tracks.summarization import Summarization

# Every model of lm-eval 0.4.13 that answers from a server, and its address where the class has one of its own.
REMOTE = {
    "anthropic-chat": "api.anthropic.com",
    "anthropic-chat-completions": "api.anthropic.com",
    "anthropic-completions": "api.anthropic.com",
    "ggml": None,
    "gguf": None,
    "litellm": "the provider that LiteLLM chooses",
    "litellm-chat": "the provider that LiteLLM chooses",
    "litellm-chat-completions": "the provider that LiteLLM chooses",
    "local-chat-completions": None,
    "local-completions": None,
    "openai-chat-completions": None,
    "openai-completions": None,
    "sglang-generate": None,
    "textsynth": "api.textsynth.com",
    "watsonx_llm": "watsonx",
}
# Of the others these need packages that nobody here has; their modules import no client of a server.
NOT_INSTALLED = {"habana", "ipex", "megatron_lm", "nemo_lm", "neuronx", "onnxruntime", "onnxruntime-genai", "openvino"}
NOT_INSTALLED |= {"mamba_ssm", "sglang", "trtllm", "vllm", "vllm-vlm", "winml", "hf-audiolm-qwen"}


def unbuilt(name: str) -> Any:
    """An instance without its constructor, which would want packages and keys."""
    module, _, attribute = MODEL_MAPPING[name].partition(":")
    return object.__new__(getattr(import_module(module), attribute))


def at(name: str, base_url: str) -> Any:
    lm = unbuilt(name)
    lm.base_url = base_url
    return lm


def task(sharing: str | None, **metadata: Any) -> Summarization:
    declared = {"task": "t", "dataset": "iu_cxr", "prompt": "{findings}", "metadata": {"version": 1, **metadata}}
    return Summarization({**declared, **({} if sharing is None else {"sharing": sharing})})


@pytest.mark.parametrize("name", REMOTE)
def test_each_model_that_asks_a_server_is_known(name: str) -> None:
    assert remote_host(unbuilt(name)) == (REMOTE[name] or "a server")


def test_no_other_model_is_taken_for_one() -> None:
    assert MODEL_MAPPING.keys() >= REMOTE.keys() | NOT_INSTALLED
    local = MODEL_MAPPING.keys() - REMOTE.keys() - NOT_INSTALLED
    assert {name: remote_host(unbuilt(name)) for name in local} == dict.fromkeys(local)
    assert {"hf", "hf-multimodal", "dummy"} <= local
    assert remote_host(BaselineBackend()) is None


@pytest.mark.parametrize(
    ("base_url", "host"),
    [
        ("http://localhost:8000/v1/chat/completions", None),
        ("http://127.0.0.1:8000/v1", None),
        ("http://127.9.9.9/v1", None),
        ("http://[::1]:8000/v1", None),
        ("localhost:8000/v1", None),
        ("https://api.openai.com/v1/completions", "api.openai.com"),
        ("http://10.0.0.5:8000/v1", "10.0.0.5"),
        ("http://localhost.example.com/v1", "localhost.example.com"),
        ("http://127.0.0.1@example.com/v1", "example.com"),
        ("http://user:secret@llm.example.com/v1", "llm.example.com"),
        ("example.com/localhost", "example.com"),
    ],
)
@pytest.mark.parametrize("name", ["local-chat-completions", "gguf"])
def test_only_a_server_on_this_machine_is_local(name: str, base_url: str, host: str | None) -> None:
    assert remote_host(at(name, base_url)) == host


def test_a_local_address_makes_litellm_no_local_model() -> None:
    assert remote_host(at("litellm", "http://localhost:1/v1")) == "the provider that LiteLLM chooses"


def test_a_strangers_class_is_known_by_its_address() -> None:
    class Client(LM):  # type: ignore[misc]
        base_url = "https://llm.example.com"
        loglikelihood = loglikelihood_rolling = generate_until = None

    assert remote_host(Client()) == "llm.example.com"


def test_the_cache_around_a_model_hides_nothing() -> None:
    wrapped = object.__new__(CachingLM)
    wrapped.lm = unbuilt("textsynth")
    assert remote_host(wrapped) == "api.textsynth.com"


@pytest.mark.parametrize("sharing", [None, "aggregate", "hashed"])
def test_data_that_may_not_be_shared_is_refused_in_one_line(sharing: str | None) -> None:
    lm = at("openai-chat-completions", "https://api.openai.com/v1/chat/completions")
    with pytest.raises(
        UserError, match=rf"api\.openai\.com.*iu_cxr.*sharing: {sharing or 'aggregate'}.*allow_remote"
    ) as e:
        refuse_remote(task(sharing), lm)
    assert "\n" not in str(e.value)
    assert refuse_remote(task(sharing, allow_remote=True), lm) == "api.openai.com"
    assert refuse_remote(task(sharing), DummyLM()) is None  # negative control


def test_data_that_is_free_is_sent() -> None:
    assert refuse_remote(task("full"), unbuilt("textsynth")) == "api.textsynth.com"


@pytest.mark.parametrize(
    ("declared", "message"),
    [({"sharing": "everything"}, "expected sharing to be"), ({}, "expected allow_remote to be")],
)
def test_a_misspelt_level_is_refused(declared: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse_remote(task(declared.get("sharing"), allow_remote="yes"), DummyLM())


def test_every_shipped_set_says_what_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    from medvlm_harness import plugin

    plugin.install()
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    loaded = TaskManager().load(["iu_cxr_summarization", "demo_cxr_summarization", "radgraph_entities"])["tasks"]
    assert {name: one.sharing for name, one in loaded.items()} == {
        "iu_cxr_summarization": "hashed",
        "demo_cxr_summarization": "full",
        "radgraph_entities": "aggregate",
    }


# --- through a run


class Server(BaseHTTPRequestHandler):
    """Answers every chat with the same words, and keeps what it was asked."""

    asked: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(json.loads(body)["messages"][-1]["content"])
        answer = json.dumps({"choices": [{"index": 0, "message": {"content": "No acute disease."}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Server.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def ask(
    tmp_path: Path, write_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, server: ThreadingHTTPServer
) -> Callable[..., Any]:
    """Four reports that may not be shared, summarised by lm-eval's chat client."""
    pytest.importorskip("tenacity", reason="lm-eval's clients need lm_eval[api]")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from medvlm_harness import plugin

    plugin.install()
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    splits = ["test"] * 4 + ["train"] * 2
    studies = [
        Study(f"s{k}", f"p{k}", findings=f"finding {k}.", impression=f"disease {k}", labels={"rules": {}}, split=split)
        for k, split in enumerate(splits)
    ]
    write_set(tmp_path / "closed", studies)
    text = "class: !function medvlm_harness.Summarization\ntask: closed\ndataset: closed\nprompt: '{findings}'\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "closed.yaml").write_text(text)
    monkeypatch.setenv("MEDVLM_DATA", str(tmp_path))

    def run(host: str, **metadata: Any) -> Any:
        address = f"http://{host}:{server.server_address[1]}/v1/chat/completions"
        return lm_eval.simple_evaluate(
            model="local-chat-completions",
            model_args={"model": "m", "base_url": address},
            tasks=["closed"],
            task_manager=TaskManager(include_path=str(tmp_path / "tasks"), metadata=metadata),
            apply_chat_template=True,
        )

    return run


def test_a_server_on_this_machine_is_asked(ask: Callable[..., Any]) -> None:
    results = ask("127.0.0.1")
    assert len(Server.asked) == 4
    assert results["medvlm"]["tasks"]["closed"]["remote"] is None


def test_nothing_is_sent_to_another_unless_it_is_allowed(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same server under a name that is no name of this machine.
    monkeypatch.setattr("medvlm_harness.results.remote._is_this_machine", lambda host: False)
    with pytest.raises(UserError, match="closed may not be sent to others"):
        ask("127.0.0.1")
    assert Server.asked == []
    results = ask("127.0.0.1", allow_remote=True)
    assert len(Server.asked) == 4
    closed = results["medvlm"]["tasks"]["closed"]
    assert (closed["remote"], closed["dataset"]["sharing"]) == ("127.0.0.1", "aggregate")


# --- lm-eval's own push to the Hub


@pytest.mark.parametrize("sharing", [None, "aggregate", "hashed"])
@pytest.mark.parametrize("push", ["push_results_to_hub", "push_samples_to_hub"])
def test_the_own_push_of_lm_eval_is_refused_for_data_that_may_not_be_shared(sharing: str | None, push: str) -> None:
    with pytest.raises(UserError, match=rf"{push}.*sharing: {sharing or 'aggregate'}.*medvlm push"):
        refuse_hub_push([task("full"), task(sharing)], (push,))
    refuse_hub_push([task("full")], (push,))  # negative controls
    refuse_hub_push([task(sharing)], ())


def test_it_is_refused_before_anything_is_asked(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lm_eval.loggers import EvaluationTracker

    monkeypatch.setattr(plugin.scope, "hub_pushes", ())
    asked = {"hub_results_org": "acme", "token": "none", "push_samples_to_hub": True}
    EvaluationTracker(output_path=str(tmp_path), **asked)
    with pytest.raises(UserError, match=r"syn_zeroshot: --hf_hub_log_args push_samples_to_hub would send"):
        run(["syn_zeroshot"])
    EvaluationTracker(output_path=str(tmp_path))
    assert run(["syn_zeroshot"])["results"]


def test_so_are_loggers_that_would_get_the_samples(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.loggers import WandbLogger

    monkeypatch.setattr(plugin.scope, "sample_loggers", ())
    monkeypatch.setattr(plugin.scope, "hub_pushes", ())
    with contextlib.suppress(ImportError, UnboundLocalError):  # wandb itself need not be there
        WandbLogger({})
    with pytest.raises(UserError, match=r"syn_zeroshot: --wandb_args with --log_samples would send"):
        run(["syn_zeroshot"])
    assert run(["syn_zeroshot"], log_samples=False)["results"]
