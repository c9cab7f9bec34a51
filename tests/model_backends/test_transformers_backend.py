"""Finding checkpoints, the precision they are stored in, quantisation and adapters."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import CARD_FILE
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.quantization import QUANTIZATIONS

REQUESTS = [
    Instance("loglikelihood", {}, (context, continuation), 0)
    for context in ("the heart is normal", "a", "there is a small left pleural effusion with")
    for continuation in (" yes", " no acute cardiopulmonary abnormality")
]


def ours(folder: Path | str, **options: Any) -> LanguageModelBackend:
    return LanguageModelBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})


def scores(backend: LanguageModelBackend) -> list[float]:
    return [score for score, _ in backend.loglikelihood(REQUESTS)]


@pytest.fixture
def copy(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A folder of one's own to change."""

    def make(kind: str, **settings: Any) -> Path:
        folder = tmp_path / f"copy of {kind}"
        shutil.copytree(tiny_model(kind), folder)
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in {**config, **settings}.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


# --- precision


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dtype": "float16"}, "fp16"),
        ({"dtype": ..., "torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": ..., "text_config": {"dtype": "bfloat16"}}, "bf16"),
        ({"dtype": ...}, "fp32"),  # what the tensors are
    ],
)
def test_the_precision_is_the_checkpoints_own(
    copy: Callable[..., Path], settings: dict[str, Any], expected: str
) -> None:
    backend = ours(copy("llama", **settings))
    assert (backend.precision, backend.precision_asked) == (expected, "checkpoint")
    assert not backend.loaded


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_configuration_without_a_type_leaves_it_to_the_tensors(copy: Callable[..., Path], suffix: str) -> None:
    folder = copy("llama", dtype=...)
    state = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    if suffix == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    backend = ours(folder)
    assert backend.precision == "fp16"
    backend.ensure_loaded()
    assert {p.dtype for p in backend.decoder.network.parameters()} == {torch.float16}


def test_a_precision_that_is_asked_for_wins(copy: Callable[..., Path]) -> None:
    backend = ours(copy("llama", dtype="float16"), precision="bf16")
    backend.ensure_loaded()
    assert {p.dtype for p in backend.decoder.network.parameters()} == {torch.bfloat16}


def test_parts_that_are_kept_in_fp32_on_purpose_stay_so(copy: Callable[..., Path]) -> None:
    """T5's `wo` overflows in fp16: transformers keeps it, and moving the model must not cast it."""
    backend = ours(copy("t5"), precision="fp16")
    backend.ensure_loaded()
    kinds = {name.rpartition(".wo.")[1]: p.dtype for name, p in backend.decoder.network.named_parameters()}
    assert kinds == {".wo.": torch.float32, "": torch.float16}


def test_a_type_without_a_name_asks_for_one(copy: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"float64: add precision=fp32, bf16 or fp16"):
        ours(copy("llama", dtype="float64"))


def test_an_unknown_precision_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="Expected precision to be one of"):
        ours(tiny_model("llama"), precision="fp8")


# --- where it lies


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "Expected pretrained to be a folder"),
        ("/no/where/at/all", "Expected pretrained to be a folder"),
        ("a/b/c", "Expected pretrained to be a folder"),
    ],
)
def test_a_path_to_nothing_is_told_without_asking_the_hub(name: str, message: str, no_network: None) -> None:
    with pytest.raises(UserError, match=message):
        ours(name)


def test_a_folder_without_a_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"config\.json .* gguf_file=NAME\.gguf"):
        ours(tmp_path)


def test_broken_settings_are_told_in_one_line(copy: Callable[..., Path]) -> None:
    folder = copy("llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON") as error:
        ours(folder)
    assert "\n" not in str(error.value)


def test_without_a_network_a_hub_name_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"There is no folder org/name here, .* pretrained=DIR") as error:
        ours("org/name")
    assert "\n" not in str(error.value)


def test_a_hub_name_is_read_as_its_snapshot(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tiny_model("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    backend = ours("org/llama", model_revision="a" * 40)
    assert scores(backend) == scores(ours(tiny_model("llama")))
    assert backend.weights_sha256 == ours(tiny_model("llama")).weights_sha256
    assert backend.card.name == "llama"
    assert backend.card.source is not None
    assert (backend.card.source.location, backend.card.source.revision) == ("org/llama", "a" * 40)
    (name, options), *rest = asked
    assert name == "org/llama" and not rest
    assert options["revision"] == "a" * 40
    assert not any(pattern.endswith(".py") for pattern in options["allow_patterns"])


# --- quantisation


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("way", QUANTIZATIONS)
def test_rounded_weights_answer_nearly_as_the_whole_ones(
    tiny_model: Callable[[str], Path], kind: str, way: str
) -> None:
    if importlib.util.find_spec(QUANTIZATIONS[way].library) is None:
        pytest.skip(f"needs {QUANTIZATIONS[way].library}")
    folder = tiny_model(kind)
    backend = ours(folder, quantization=way)
    exact, rounded = torch.tensor(scores(ours(folder))), torch.tensor(scores(backend))
    assert float((exact - rounded).abs().max()) > 0
    assert float(((exact - rounded) / exact).abs().max()) < (0.6 if way == "nf4" else 0.15)
    assert backend.parameters == ours_parameters(folder)
    texts = backend.generate_until([Instance("generate_until", {}, ("the heart", {"max_gen_toks": 4}), 0)])
    assert texts[0]


def ours_parameters(folder: Path) -> int | None:
    backend = ours(folder)
    backend.ensure_loaded()
    return backend.parameters


@pytest.mark.parametrize("way", QUANTIZATIONS)
def test_rounded_weights_answer_the_same_at_every_batch_size(
    copy: Callable[..., Path], way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With outliers in the activations, which int8 treats column by column of a whole batch."""
    if importlib.util.find_spec(QUANTIZATIONS[way].library) is None:
        pytest.skip(f"needs {QUANTIZATIONS[way].library}")
    folder = copy("llama")
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"][::7] *= 40
    state["model.layers.1.input_layernorm.weight"][3] = 30
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        one, many = (ours(folder, quantization=way, batch_size=n) for n in (1, 8))
    assert scores(one) == pytest.approx(scores(many), rel=1e-5, abs=1e-5)
    assert ("batch_size=8 is not used" in caplog.text) is QUANTIZATIONS[way].alone


def test_how_weights_are_rounded_is_part_of_the_identity_and_the_result(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    whole, rounded = ours(folder), ours(folder, quantization="nf4")
    assert whole.identity is not None and rounded.identity is not None
    assert whole.identity["quantization"] is None
    assert rounded.identity["quantization"]["name"] == "nf4"
    assert rounded.identity["quantization"]["bitsandbytes"]
    assert {k: v for k, v in whole.identity.items() if k != "quantization"} == {
        k: v for k, v in rounded.identity.items() if k != "quantization"
    }
    assert rounded.describe()["quantization"].items() >= rounded.identity["quantization"].items()


def test_an_unknown_way_names_the_nearest(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"Expected quantization to be int8.*Did you mean nf4\?"):
        ours(tiny_model("llama"), quantization="nf5")


@pytest.mark.parametrize("way", QUANTIZATIONS)
def test_a_missing_library_is_named_with_the_command(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    hide(monkeypatch, QUANTIZATIONS[way].library)
    with pytest.raises(UserError, match=rf"needs {QUANTIZATIONS[way].library}, .*: pip install"):
        ours(tiny_model("llama"), quantization=way)


def hide(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """As if it were not installed."""
    for module in ("quantization", "transformers_backend"):
        monkeypatch.setattr(
            f"medvlm_harness.model_backends.{module}.find_spec",
            lambda name: None if name == library else importlib.util.find_spec(name),
        )


# --- adapters


@pytest.fixture
def adapter(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A LoRA with random weights, as PEFT saves it."""

    def make(kind: str = "llama", *, name: str = "adapter", seed: int = 5) -> Path:
        model_class: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        targets = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            model: Any = get_peft_model(model_class.from_pretrained(tiny_model(kind)), config)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_adapter_answers_as_when_merged_into_the_weights(
    tiny_model: Callable[[str], Path], adapter: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder, put_on = tiny_model(kind), adapter(kind)
    model_class: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    merged = PeftModel.from_pretrained(model_class.from_pretrained(folder), put_on).merge_and_unload()
    shutil.copytree(folder, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    backend = ours(folder, peft=str(put_on))
    assert scores(backend) == pytest.approx(scores(ours(tmp_path / "merged")), rel=1e-4)
    assert scores(backend) != pytest.approx(scores(ours(folder)), rel=1e-3)


def test_the_vocabulary_of_an_adapted_model_keeps_its_size(
    tiny_model: Callable[[str], Path], adapter: Callable[..., Path]
) -> None:
    """T5 has more embeddings than its tokenizer has tokens, and its softmax runs over all of them."""
    backend = ours(tiny_model("t5"), peft=str(adapter("t5")))
    size = backend.decoder.network.get_input_embeddings().weight.shape[0]
    assert size == backend.config.vocab_size > len(backend.tokenizer)


def test_an_adapter_counts_in_parameters_identity_and_result(
    tiny_model: Callable[[str], Path], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    one, other = ours(folder, peft=str(adapter())), ours(folder, peft=str(adapter(name="other", seed=6)))
    moved = tmp_path / "moved"
    shutil.copytree(adapter(), moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    identities = [b.adapter_identity() for b in (ours(folder), one, other, ours(folder, peft=str(moved)))]
    assert identities[0] is None
    assert identities[1] == identities[3] != identities[2]
    one.ensure_loaded()
    base = ours_parameters(folder)
    assert base is not None and one.parameters == base + 2 * 2 * (2 * 32 + 32 + 16)
    assert one.describe()["adapter"] == identities[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(sorted(state)[0]), "1 keys missing, 0 unexpected"),
        (lambda state: state.update({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}), "0 keys missing, 1 un"),
        (lambda state: state.update({sorted(state)[0]: torch.zeros(2, 7)}), "does not fit LlamaForCausalLM"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tiny_model: Callable[[str], Path],
    adapter: Callable[..., Path],
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    folder = adapter()
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        ours(tiny_model("llama"), peft=str(folder)).ensure_loaded()
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_adapter_is_told(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json and adapter_model\.safetensors"):
        ours(tiny_model("llama"), peft=str(tmp_path))


@pytest.mark.parametrize(
    ("base", "added", "expected"),
    [
        ("trained_on: [MIMIC-CXR]", "trained_on: [R2Gen train split]", ("MIMIC-CXR", "R2Gen train split")),
        ("trained_on: [MIMIC-CXR]", None, None),
        (None, "trained_on: [R2Gen train split]", None),
    ],
)
def test_what_an_adapter_was_trained_on_counts_and_what_nobody_says_is_unknown(
    copy: Callable[..., Path], adapter: Callable[..., Path], base: str | None, added: str | None, expected: Any
) -> None:
    folder, put_on = copy("llama"), adapter()
    for place, text in ((folder, base), (put_on, added)):
        if text is not None:
            (place / CARD_FILE).write_text(text)
    assert ours(folder, peft=str(put_on)).card.trained_on == expected


def test_an_adapter_goes_on_rounded_weights(tiny_model: Callable[[str], Path], adapter: Callable[..., Path]) -> None:
    folder, put_on = tiny_model("llama"), adapter()
    whole = torch.tensor(scores(ours(folder, peft=str(put_on))))
    rounded = torch.tensor(scores(ours(folder, peft=str(put_on), quantization="nf4")))
    assert 0 < float(((whole - rounded) / whole).abs().max()) < 0.5


# --- GGUF


def test_a_missing_gguf_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"needs the package gguf, .* pip install 'medvlm-harness\[gguf\]'"):
        ours(tmp_path / "tiny.gguf")


def test_a_gguf_file_that_is_not_there_lists_what_is(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(UserError, match=r"holds tiny\.gguf\), but got 'other\.gguf'"):
        ours(tmp_path, gguf_file="other.gguf")


def test_a_broken_gguf_file_is_told_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(UserError, match=r"Cannot load the configuration of .*tiny\.gguf") as error:
        ours(tmp_path / "tiny.gguf")
    assert "\n" not in str(error.value)


def test_a_gguf_file_answers_as_the_folder_that_it_was_made_from(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, path = tiny_model("llama"), tmp_path / "tiny.gguf"
    write_gguf(folder, path)
    named, in_folder = ours(path), ours(tmp_path, gguf_file=path.name)
    assert (named.precision, named.precision_asked) == ("fp32", "checkpoint")
    assert named.card.name == "tiny"
    assert scores(named) == pytest.approx(scores(ours(folder)), rel=1e-5)
    assert scores(named) == scores(in_folder)
    assert list(named.weights) == ["tiny.gguf"]
    rounded = ours(path, quantization="nf4")
    exact, found = torch.tensor(scores(named)), torch.tensor(scores(rounded))
    assert 0 < float(((exact - found) / exact).abs().max()) < 0.6
    assert rounded.describe()["quantization"]["share"] == 1


def write_gguf(folder: Path, path: Path) -> None:
    """A Llama folder as llama.cpp's converter writes it: unrounded, query and key rows in its own order."""
    gguf: Any = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, suffix = name.rpartition(".")
        for part, n in (("q_proj", heads), ("k_proj", kv_heads)):
            if stem.endswith(part):
                tensor = tensor.view(n, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
