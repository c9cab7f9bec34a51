from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.sequences import Scored
from medvlm_harness.model_backends.vlm import VlmBackend
from medvlm_harness.training import language_lora
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.finetune import finetune
from medvlm_harness.training.language_lora import LanguageLoraMethod, _items, _LanguageTraining, _task
from medvlm_harness.training.methods import Schedule, Trained

torch.set_num_threads(1)
ADAPTER = "adapter_model.safetensors"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT = (
    "{% for turn in messages %}<s>{% for part in turn['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}\nassistant: {% endif %}"
)


@pytest.fixture(scope="module")
def data(demo: Dataset) -> TrainingData:
    """A few studies of the demo."""
    whole = TrainingData.of(demo)
    return replace(whole, train=whole.train[:12], validation=whole.validation[:6])


@pytest.fixture(scope="module")
def models(small_language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path, Any]]:
    """Kind -> name, folder and backend of a random model."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(small_language_model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "n_positions": 512}
        tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **tokens)).save_pretrained(root / "t5")
        tokenizer.save_pretrained(root / "t5")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        config = LlavaConfig(
            text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **SIZES),
            vision_config=CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 3}, image_size=32, patch_size=8),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
        LlavaForConditionalGeneration(config).save_pretrained(root / "llava")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    places = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer, image_token="<image>", chat_template=CHAT, **places)  # noqa: S106
    processor.save_pretrained(root / "llava")
    return {
        "causal": ("medvlm-lm", small_language_model, LanguageModelBackend),
        "seq2seq": ("medvlm-lm", root / "t5", LanguageModelBackend),
        "vlm": ("medvlm-vlm", root / "llava", VlmBackend),
    }


@pytest.fixture
def train(models: dict[str, Any], data: TrainingData, tmp_path: Path) -> Callable[..., Trained]:
    """Train on a kind of base into a folder below `tmp_path`."""

    def run(kind: str, name: str = "out", *, args: str = "", steps: int = 4, seed: int = 0, **given: Any) -> Trained:
        model, folder, _ = models[kind]
        schedule = Schedule(steps=steps, batch_size=4, seed=seed, eval_steps=2)
        own = {"rank": 4, "learning_rate": 0.01, "validation_studies": 4, "validation_generations": 2, **given}
        model_args = f"pretrained={folder}{args}"
        method = LanguageLoraMethod(model=model, model_args=model_args, device="cpu", schedule=schedule, **own)
        return finetune(method, data, tmp_path / name)

    return run


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[_LanguageTraining]:
    """What was trained in memory."""
    made: list[_LanguageTraining] = []

    class Kept(_LanguageTraining):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(language_lora, "_LanguageTraining", Kept)
    return made


def scores(decoder: Any, items: Any) -> torch.Tensor:
    return torch.tensor([score for item in items for score, _ in decoder.score([item])])


@pytest.mark.parametrize(
    ("kind", "args", "atol"),
    [
        ("causal", "", 1e-4),
        ("causal", ",quantization=nf4", 1e-4),
        ("causal", ",quantization=int8", 1e-4),
        ("seq2seq", "", 1e-4),
        ("vlm", "", 1e-4),
    ],
)
def test_what_was_trained_is_what_is_loaded_again(
    kind: str,
    args: str,
    atol: float,
    train: Callable[..., Trained],
    models: dict[str, Any],
    trainings: list[_LanguageTraining],
    tmp_path: Path,
) -> None:
    trained = train(kind, args=args)
    (training,) = trainings
    assert trained.validation_loss < trained.first_validation_loss
    training.module.eval()
    own = scores(training.decoder, training.validation)
    way = {"quantization": args.rpartition("=")[2]} if args else {}
    _, folder, backend = models[kind]
    options = {"pretrained": str(folder), "device": "cpu", "store": "off", **way}
    again = scores(backend(**options, peft=str(tmp_path / "out")).decoder, training.validation)
    before = scores(backend(**options).decoder, training.validation)
    # Sums over some 100 tokens: 1e-4 of a sum is 1e-6 of a token.
    torch.testing.assert_close(again, own, atol=atol, rtol=0)
    assert (before - own).abs().min() > 1
    stored = load_file(tmp_path / "out" / ADAPTER)
    assert trained.parameters == sum(tensor.numel() for tensor in stored.values())
    assert not any("vision" in name or "lm_head" in name for name in stored)
    assert set(trained.validation) == {"rougeL_before", "rougeL_after", "rougeL_after_minus_before"}


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "vlm"])
def test_the_loss_is_the_likelihood_that_an_evaluation_gives(
    kind: str, train: Callable[..., Trained], trainings: list[_LanguageTraining]
) -> None:
    train(kind, steps=1)
    (training,) = trainings
    training.module.eval()
    items = [Scored(item.prompt, item.ids[: 20 + 9 * k]) for k, item in enumerate(training.validation)]  # to be padded
    losses = training.losses(items)
    assert losses.requires_grad
    sums = torch.stack([part.sum() for part in losses.split([len(item.ids) for item in items])])
    torch.testing.assert_close(-sums.detach(), scores(training.decoder, items), atol=1e-3, rtol=0)


def test_the_prompt_is_the_tasks_and_the_text_ends(
    train: Callable[..., Trained], trainings: list[_LanguageTraining], data: TrainingData
) -> None:
    train("causal", steps=1)
    study, item = data.train[0], trainings[0].train[0]
    tokenizer = trainings[0].backend.tokenizer
    expected = f"Summarize the findings of this chest x-ray report in its impression.\n\nFindings: {study.findings}"
    assert tokenizer.decode(item.prompt.ids).removeprefix("<s>") == f"{expected}\n\nImpression:"
    assert item.ids[-1] == tokenizer.eos_token_id or len(item.ids) == 128  # the task's longest
    assert f" {study.impression}".startswith(tokenizer.decode(item.ids[:-1]))


def test_a_model_that_sees_images_is_asked_for_findings(data: TrainingData) -> None:
    task = _task("demo_cxr_report_generation", sees=True)
    items = _items(task, data, data.train)
    prompt, visual = items[0].arguments
    assert prompt.startswith("<image>\nWrite the findings section")
    assert visual["visual"] == list(data.images(data.train[0]))
    assert items[0].target == data.train[0].findings.strip()


def test_gradients_that_vanish_after_an_evaluation_are_told(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bitsandbytes' packed layers do it: from the first evaluation on, nothing reaches the adapter."""
    real = _LanguageTraining.losses
    evaluated: list[bool] = []

    def packed(self: _LanguageTraining, items: Any) -> torch.Tensor:
        evaluated.append(not self.module.training)
        losses = real(self, items)
        return losses.detach() if any(evaluated[1:]) else losses

    monkeypatch.setattr(_LanguageTraining, "losses", packed)
    with pytest.raises(UserError, match=r"No gradient reaches 28 of 28 parameters at step 3 \(such as .*lora_A"):
        train("causal", steps=5)


def test_two_runs_of_a_seed_are_equal(train: Callable[..., Trained], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("causal", name, seed=seed, dropout=0.1, steps=2)
    a, b, c = (load_file(tmp_path / name / ADAPTER) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "causal",
            {"task": "demo_cxr_summarisation"},
            "Unknown task 'demo_cxr_summarisation'. Did you mean",
        ),
        ("causal", {"task": "demo_cxr_report_generation"}, "Expected task to be one of class Summarization"),
        ("vlm", {"task": "demo_cxr_summarization"}, "Expected task to be one of class ReportGeneration"),
        ("causal", {"targets": "q_prj"}, "No layer that can be trained is called 'q_prj'. Did you mean q_proj"),
        ("causal", {"targets": "lm_head"}, "No layer that can be trained is called 'lm_head'"),
        ("causal", {"args": ",quantization=int8-dynamic"}, "int8-dynamic passes no gradient on"),
        ("causal", {"args": ",peft=DIR"}, "a base model without an adapter"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    train: Callable[..., Trained], tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        train(kind, **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
