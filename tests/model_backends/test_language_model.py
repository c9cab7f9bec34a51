"""`medvlm-lm` against lm-eval's own `hf` on the same tiny models, at every batch size, through the store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.requests import Generation, ImageRef
from medvlm_harness.store import Store

KINDS = ("llama", "gpt2", "t5")
CONTEXTS = (
    "the heart is normal",
    "summarize the report: there is a small left pleural effusion with adjacent atelectasis",
    "a",
    "findings: enlarged cardiac silhouette. impression:",
    "no pneumothorax ",
)
CONTINUATIONS = (" yes", " no acute cardiopulmonary abnormality", "?")
TEXTS = ("the lungs are clear", "", " ".join(["stable since the prior study."] * 20))
LENGTH = 14


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def generate(contexts: Sequence[str], **kwargs: Any) -> list[Instance]:
    given = {"max_gen_toks": LENGTH, **kwargs}
    return [Instance("generate_until", {}, (text, given), 0, ("task", k, 1)) for k, text in enumerate(contexts)]


def scored(pairs: Sequence[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def rolling(texts: Sequence[str]) -> list[Instance]:
    return [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]


PAIRS = [(context, continuation) for context in ("", *CONTEXTS) for continuation in CONTINUATIONS]


def ours(folder: Path, **options: Any) -> LanguageModelBackend:
    return LanguageModelBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})


def stock(folder: Path, **options: Any) -> Any:
    """lm-eval's own, one request at a time: with more, hf's answers depend on what else is in a batch."""
    return HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32", **options)


# --- the same as lm-eval's hf


def test_log_likelihoods_are_those_of_hf(tiny_model: Callable[[str], Path], kind: str) -> None:
    folder = tiny_model(kind)
    expected = stock(folder).loglikelihood(scored(PAIRS), disable_tqdm=True)
    found = ours(folder, batch_size=4).loglikelihood(scored(PAIRS))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)


def test_rolling_log_likelihoods_are_those_of_hf_also_beyond_the_context(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    folder = tiny_model(kind)
    backend = ours(folder, batch_size=2)
    assert len(backend.encode_windows(TEXTS[2])) > 1
    expected = stock(folder).loglikelihood_rolling(rolling(TEXTS), disable_tqdm=True)
    assert backend.loglikelihood_rolling(rolling(TEXTS)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_are_those_of_hf(tiny_model: Callable[[str], Path], kind: str) -> None:
    folder = tiny_model(kind)
    free = stock(folder).generate_until(generate(CONTEXTS), disable_tqdm=True)
    assert ours(folder, batch_size=3).generate_until(generate(CONTEXTS)) == free
    stops = [free[0][3:5], free[1][6:7]]  # of which the model writes one at least
    expected = stock(folder).generate_until(generate(CONTEXTS, until=stops), disable_tqdm=True)
    assert expected != free
    assert ours(folder, batch_size=3).generate_until(generate(CONTEXTS, until=stops)) == expected


def test_texts_of_an_encoder_decoder_are_those_of_hf_up_to_the_length_asked_for(
    tiny_model: Callable[[str], Path],
) -> None:
    """`hf` lets them grow by the length of the context, which an encoder-decoder's own text does not contain."""
    folder = tiny_model("t5")
    hf, backend = stock(folder), ours(folder, batch_size=3)
    longer = hf.generate_until(generate(CONTEXTS), disable_tqdm=True)
    found = backend.generate_until(generate(CONTEXTS))
    for text, whole in zip(found, longer, strict=True):
        assert whole.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert any(text.finished for text in found if isinstance(text, Generation))


def test_a_prompt_that_begins_with_the_begin_token_gets_no_second(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    with_token = [f"<s>{text}" for text in CONTEXTS]
    backend = ours(folder)
    assert backend.generate_until(generate(with_token)) == backend.generate_until(generate(CONTEXTS))
    expected = stock(folder).loglikelihood(scored([(with_token[0], " yes")]), disable_tqdm=True)
    assert backend.loglikelihood(scored([(with_token[0], " yes")]))[0][0] == pytest.approx(expected[0][0], rel=1e-6)


# --- batches


def test_answers_do_not_depend_on_the_batch_size(tiny_model: Callable[[str], Path], kind: str) -> None:
    folder = tiny_model(kind)
    one, many = (ours(folder, batch_size=n) for n in (1, 64))
    assert one.generate_until(generate(CONTEXTS)) == many.generate_until(generate(CONTEXTS))
    alone, together = (backend.loglikelihood(scored(PAIRS)) for backend in (one, many))
    assert [score for score, _ in alone] == pytest.approx([score for score, _ in together], rel=1e-7, abs=1e-5)
    assert [greedy for _, greedy in alone] == [greedy for _, greedy in together]


def test_a_row_that_ended_keeps_its_text_while_others_go_on(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    free = ours(folder, batch_size=1).generate_until(generate(CONTEXTS))
    stop = free[0][2:4]
    together = ours(folder, batch_size=8).generate_until(generate(CONTEXTS, until=[stop]))
    assert together == [text.partition(stop)[0] for text in free]
    assert [t.finished for t in together if isinstance(t, Generation)] == [stop in text for text in free]


def test_any_end_token_of_the_generation_configuration_ends_a_text(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "ends"
    shutil.copytree(tiny_model("llama"), folder)
    backend = ours(folder)
    tokens = backend.decoder.network.generate(
        torch.tensor([backend.encode_prompt((CONTEXTS[0],), 100).ids]), max_new_tokens=LENGTH, do_sample=False
    )
    third = int(tokens[0, -LENGTH + 3])
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [1, third]}))
    changed = ours(folder, batch_size=8)
    found = changed.generate_until(generate(CONTEXTS))
    # hf leaves the end token in the text where the tokenizer does not call it special.
    for text, whole in zip(found, stock(folder).generate_until(generate(CONTEXTS), disable_tqdm=True), strict=True):
        assert whole in (text, text + backend.tokenizer.decode([third]))
    assert isinstance(found[0], Generation) and found[0].finished
    assert changed.describe()["generations_unfinished"] < len(CONTEXTS)


def test_where_memory_runs_out_the_batch_is_halved_and_answers_stay(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    expected = ours(folder).loglikelihood(scored(PAIRS)), ours(folder).generate_until(generate(CONTEXTS))
    backend = ours(folder, batch_size=16)
    score, write = backend.decoder.score, backend.decoder.generate
    sizes: list[int] = []

    def small(compute: Any) -> Any:
        def attempt(items: Any, *rest: Any) -> Any:
            sizes.append(len(items))
            if len(items) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return compute(items, *rest)

        return attempt

    monkeypatch.setattr(backend.decoder, "score", small(score))
    monkeypatch.setattr(backend.decoder, "generate", small(write))
    assert backend.loglikelihood(scored(PAIRS)) == [(pytest.approx(s, rel=1e-6), greedy) for s, greedy in expected[0]]
    assert backend.generate_until(generate(CONTEXTS)) == expected[1]
    assert max(sizes) == 16 and 2 in sizes


def test_an_automatic_batch_on_a_cpu_shrinks_with_vocabulary_and_length(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = ours(tiny_model("llama"))
    asked = (backend.batching, lambda n: None)
    assert backend._size(*asked, 100, 10) == 64
    monkeypatch.setattr(backend.config, "vocab_size", 262_144)
    assert backend._size(*asked, 1024, 1024) == 1
    assert 1 < backend._size(*asked, 1024, 64) < 64


# --- what does not fit


def test_a_context_that_is_too_long_is_cut_from_the_left_and_counted(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    folder = tiny_model(kind)
    long = " ".join(["stable since the prior study."] * 30)
    expected = stock(folder).loglikelihood(scored([(long, " yes"), ("a", " yes")]), disable_tqdm=True)
    backend = ours(folder)
    found = backend.loglikelihood(scored([(long, " yes"), ("a", " yes"), (long, " yes")]))
    assert [score for score, _ in found[:2]] == pytest.approx([score for score, _ in expected], rel=1e-6)
    backend.generate_until(generate([long, "a"]))
    assert backend.describe()["prompts_cut"] == 2  # one of each request type; asked twice it counts once


def test_a_text_of_a_cut_context_is_that_of_its_last_tokens(tiny_model: Callable[[str], Path]) -> None:
    backend = ours(tiny_model("gpt2"))
    long = " ".join(["stable since the prior study."] * 30)
    room = backend.max_length - LENGTH
    prompt = backend.encode_prompt((long,), room)
    assert prompt.ids == tuple(backend.tok_encode(long)[-room:])
    assert prompt.cut == len(backend.tok_encode(long)) - room > 0


def test_max_length_is_the_models_unless_said(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("gpt2")
    assert ours(folder).max_length == stock(folder).max_length == 96
    assert ours(folder, max_length=20).max_length == 20
    with pytest.raises(UserError, match="max_length to be 2 tokens or more"):
        ours(folder, max_length=1)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (lambda: scored([("a", "no " * 400)]), "A continuation has .* max_length=N"),
        (lambda: scored([("a", "")]), "Expected a continuation"),
        (lambda: scored([("", "")]), "Expected a continuation"),
    ],
)
def test_a_continuation_that_cannot_be_scored_is_refused(
    tiny_model: Callable[[str], Path], requests: Callable[[], list[Instance]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ours(tiny_model("gpt2")).loglikelihood(requests())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"max_gen_toks": 96}, "leaves no room"), ({"bananas": 3}, "generation_kwargs .*bananas")],
)
def test_generation_kwargs_that_do_not_work_are_told(
    tiny_model: Callable[[str], Path], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ours(tiny_model("gpt2")).generate_until(generate(["a"], **kwargs))


def test_images_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    image = ImageRef("ab" * 32, tmp_path / "x.png")
    request = Instance("generate_until", {}, ("a", {"max_gen_toks": 2}, {"visual": [image]}), 0, ("task", 0, 1))
    with pytest.raises(UserError, match="takes text alone"):
        ours(tiny_model("llama")).generate_until([request])


# --- what is no language model


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_an_encoder_is_refused_and_not_scored_as_if_it_were_causal(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    with pytest.raises(UserError, match=r"is an encoder .* use --model medvlm-text-encoder"):
        ours(tiny_model(kind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.layers.0.mlp.up_proj.weight"), "1 keys missing, 0 unexpected"),
        (lambda state: state.update({"model.extra.weight": torch.zeros(2)}), "0 keys missing, 1 unexpected"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(3)}), "Cannot load the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tiny_model("llama"), folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message) as error:
        ours(folder).ensure_loaded()
    assert "\n" not in str(error.value)


# --- the store


def test_what_is_stored_loads_no_model_and_is_the_same(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    long = " ".join(["stable since the prior study."] * 30)

    def ask(backend: LanguageModelBackend) -> Any:
        texts = backend.generate_until(generate((*CONTEXTS, long)))
        return (
            texts,
            [getattr(text, "finished", None) for text in texts],
            backend.loglikelihood(scored(PAIRS)),
            backend.loglikelihood_rolling(rolling(TEXTS)),
        )

    first = ours(folder, store="auto", batch_size=4)
    expected = ask(first)
    first.learn()
    monkeypatch.setattr(LanguageModelBackend, "load", lambda self: pytest.fail("the model was loaded"))
    second = ours(folder, store="auto", batch_size=2)
    assert ask(second) == expected
    described = second.describe()
    assert (described["generated"], described["scored"]) == (0, 0)
    assert described["generations_recalled"] == len(CONTEXTS) + 1
    assert described["scores_recalled"] == len(PAIRS) + len(TEXTS)
    assert described["prompts_cut"] == 1  # known from the store as well
    assert described["generations_unfinished"] == first.describe()["generations_unfinished"]


def test_other_generation_kwargs_are_other_answers(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    first = ours(folder, store="auto")
    (long,) = first.generate_until(generate(CONTEXTS[:1]))
    (short,) = first.generate_until(generate(CONTEXTS[:1], max_gen_toks=3))
    assert long.startswith(short) and len(short) < len(long)
    assert first.describe()["generations_recalled"] == 0


def test_other_weights_settings_or_lengths_share_no_answer(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    kinds = [ours(folder), ours(folder, precision="bf16"), ours(folder, max_length=50)]
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    spaces = [json.dumps(backend.identity, sort_keys=True) for backend in (*kinds, ours(changed))]
    assert len(set(spaces)) == 4
    assert str(folder) not in "".join(spaces)


def test_a_run_that_was_killed_goes_on_where_it_stopped(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, store = tiny_model("llama"), tmp_path / "killed.sqlite"
    expected = ours(folder, batch_size=4).loglikelihood(scored(PAIRS))
    killed = ours(folder, batch_size=4, store=str(store))
    score = killed.decoder.score
    passes: list[int] = []

    def twice(items: Any) -> Any:
        passes.append(len(items))
        if len(passes) > 2:
            raise KeyboardInterrupt
        return score(items)

    monkeypatch.setattr(killed.decoder, "score", twice)
    with pytest.raises(KeyboardInterrupt):
        killed.loglikelihood(scored(PAIRS))
    resumed = ours(folder, batch_size=4, store=str(store))
    assert resumed.loglikelihood(scored(PAIRS)) == expected  # to the last bit: the same slots
    assert resumed.scores_recalled == 8
    assert sum(info.answers for info in Store(store).spaces() if info.space.kind == "loglikelihood") == len(PAIRS)


# --- sampling


def test_sampled_texts_depend_on_prompt_seed_and_repeat_alone(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    requests = generate(CONTEXTS, do_sample=True, temperature=1.0)
    repeated = [requests[0], *requests]  # as lm-eval repeats a request
    first = ours(folder, batch_size=8).generate_until(repeated)
    torch.manual_seed(99)
    assert ours(folder, batch_size=2).generate_until(list(reversed(repeated)))[::-1][2:] == first[2:]
    assert first[0] != first[1]
    assert ours(folder, seed=1).generate_until(requests) != first[1:]


def test_sampling_leaves_torchs_own_random_numbers_alone(tiny_model: Callable[[str], Path]) -> None:
    backend = ours(tiny_model("llama"))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    backend.generate_until(generate(CONTEXTS[:1], do_sample=True, temperature=1.0))
    assert torch.equal(torch.rand(4), expected)


def test_beams_are_passed_on(tiny_model: Callable[[str], Path]) -> None:
    """Against transformers itself: hf ends a search where the first beam of a batch has ended."""
    backend = ours(tiny_model("llama"), batch_size=4)
    found = backend.generate_until(generate(CONTEXTS, num_beams=3))
    for text, context in zip(found, CONTEXTS, strict=True):
        prompt = backend.tokenizer(context, return_tensors="pt")
        tokens = backend.decoder.network.generate(**prompt, max_new_tokens=LENGTH, num_beams=3, do_sample=False)
        length = prompt["input_ids"].shape[1]
        assert text == backend.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
    assert found != backend.generate_until(generate(CONTEXTS))


# --- chat templates

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
CHAT = [{"role": "system", "content": "You report."}, {"role": "user", "content": "the heart"}]


@pytest.fixture
def with_template(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(template: str) -> Path:
        folder = tmp_path / "chat"
        shutil.copytree(tiny_model("llama"), folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.mark.parametrize("template", [TEMPLATE, STRICT])
def test_a_conversation_is_written_as_hf_writes_it(with_template: Callable[[str], Path], template: str) -> None:
    folder = with_template(template)
    backend, hf = ours(folder), stock(folder)
    assert backend.apply_chat_template(CHAT) == hf.apply_chat_template(CHAT)
    answered = [*CHAT, {"role": "assistant", "content": "is normal"}]
    assert backend.apply_chat_template(answered, False) == hf.apply_chat_template(answered, False)
    assert backend.chat_template(True) == hf.chat_template(True) == template
    assert str(folder) not in backend.tokenizer_name


def test_without_a_template_one_line_says_so(tiny_model: Callable[[str], Path]) -> None:
    backend = ours(tiny_model("llama"))
    for ask in (lambda: backend.chat_template(True), lambda: backend.apply_chat_template(CHAT)):
        with pytest.raises(UserError, match="has no chat template: leave out --apply_chat_template"):
            ask()


def test_a_template_that_refuses_the_conversation_is_told(with_template: Callable[[str], Path]) -> None:
    backend = ours(with_template("{{ raise_exception('never') }}"))
    with pytest.raises(UserError, match="refuses the conversation: never"):
        backend.apply_chat_template(CHAT[1:])
