"""`medvlm-text-encoder` against transformers itself, one text at a time; and what it refuses."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from medvlm_harness import plugin
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.text_encoder import TextEncoderBackend
from medvlm_harness.requests import (
    Generation,
    ImageRef,
    Label,
    LabelScores,
    LabelSet,
    PromptWithFloors,
    TextRef,
)
from medvlm_harness.results.run import unsupported_reason
from medvlm_harness.training.token_probe import TokenProbe, bio_tags, span_f1, word_vectors

TEXTS = (
    "the heart is normal in size",
    "there is a small left pleural effusion with adjacent atelectasis",
    "a",
    "no acute cardiopulmonary abnormality, stable since the prior study. findings: the lungs are clear",
)
PAIRS = [(context, continuation) for context in ("", *TEXTS[:3]) for continuation in (" yes", " small effusion")]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = " ".join(["stable since the prior study."] * 30)
LABELS = LabelSet(
    "set",
    "multilabel",
    (
        Label("effusion", ("pleural effusion", "an effusion"), ("no pleural effusion",)),
        Label("atelectasis", ("atelectasis",), ("no atelectasis", "clear")),
    ),
)
OPTIONS = LabelSet("options", "multiclass", (Label("0", ("normal heart",)), Label("1", ("enlarged heart",))))


@pytest.fixture(params=["bert", "distilbert"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ours(folder: Path, **options: Any) -> TextEncoderBackend:
    return TextEncoderBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})


def vectors(backend: TextEncoderBackend, texts: Sequence[str]) -> NDArray[np.float32]:
    requests = [Instance("embed", {}, (TextRef(text),), 0) for text in texts]
    return np.stack([embedding.vector for embedding in backend.embed(requests)])


def scores(backend: TextEncoderBackend, pairs: Sequence[tuple[str, str]]) -> list[float]:
    return [score for score, _ in backend.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])]


def classified(backend: TextEncoderBackend, label_set: LabelSet, texts: Sequence[str] = TEXTS) -> list[LabelScores]:
    return backend.classify([Instance("classify", {}, (TextRef(text), label_set), 0) for text in texts])


@torch.inference_mode()
def mean_by_hand(folder: Path, text: str) -> NDArray[np.float32]:
    """A text alone, without padding."""
    encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True)
    hidden = AutoModel.from_pretrained(folder).eval()(encoded["input_ids"]).last_hidden_state[0].double().numpy()
    mean = hidden.mean(axis=0)
    found: NDArray[np.float32] = (mean / np.linalg.norm(mean)).astype(np.float32)
    return found


@torch.inference_mode()
def score_by_hand(folder: Path, context: str | list[int], continuation: str) -> float:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = tokenizer.encode(context, add_special_tokens=False) if isinstance(context, str) else context
    before = [tokenizer.cls_token_id, *ids]
    own = tokenizer.encode(continuation, add_special_tokens=False)
    total = 0.0
    for k, token in enumerate(own):
        masks = [tokenizer.mask_token_id] * (len(own) - k)
        row = torch.tensor([[*before, *own[:k], *masks, tokenizer.sep_token_id]])
        total += float(torch.log_softmax(model(row).logits[0, len(before) + k].double(), dim=0)[token])
    return total


# --- vectors


def test_a_vector_is_the_mean_of_the_last_layer_over_a_texts_tokens(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    folder = tiny_model(kind)
    expected = np.stack([mean_by_hand(folder, text) for text in TEXTS])
    for size in (1, 2, 64):
        found = vectors(ours(folder, batch_size=size), TEXTS)
        assert np.abs(found - expected).max() < 1e-5
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)


def test_a_text_that_is_too_long_loses_its_end_and_says_so(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("bert")
    backend = ours(folder)
    found = backend.embed([Instance("embed", {}, (TextRef(text),), 0) for text in (LONG, TEXTS[0])])
    assert [embedding.truncated for embedding in found] == [True, False]
    assert np.abs(found[0].vector - mean_by_hand(folder, LONG)).max() < 1e-5


def sentence_folder(tiny_model: Callable[[str], Path], folder: Path, **pooling: Any) -> Path:
    """The tiny BERT as sentence-transformers saves it: the encoder alone, and how it is pooled."""
    BertModel.from_pretrained(tiny_model("bert")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model("bert")).save_pretrained(folder)
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    return folder


def test_a_sentence_transformers_folder_is_pooled_and_cut_as_it_says(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = sentence_folder(tiny_model, tmp_path / "sentences", pooling_mode_cls_token=True)
    backend = ours(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    for text in (TEXTS[0], LONG):
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
        with torch.inference_mode():
            first = model(encoded["input_ids"]).last_hidden_state[0, 0].numpy()
        assert np.abs(vectors(backend, [text])[0] - first / np.linalg.norm(first)).max() < 1e-5
    assert (backend.max_length, backend.describe()["pooling"]) == (16, "cls")


def test_pooling_and_case_are_part_of_the_identity(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    first = sentence_folder(tiny_model, tmp_path / "first", pooling_mode_cls_token=True)
    mean = sentence_folder(tiny_model, tmp_path / "mean", pooling_mode_mean_tokens=True)
    identities = [json.dumps(b.identity) for b in (ours(first), ours(mean), ours(mean, lower_case=False))]
    assert len(set(identities)) == 3


def test_token_vectors_are_the_last_layer_with_the_characters_they_stand_for(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    folder = tiny_model(kind)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for size in (1, 8):
        found = ours(folder, batch_size=size).encode_tokens((*TEXTS, LONG))
        for text, one in zip((*TEXTS, LONG), found, strict=True):
            token_vectors, offsets = one.vectors, one.offsets
            ids = tokenizer(text, return_tensors="pt", truncation=True)["input_ids"]
            with torch.inference_mode():
                hidden = model(ids).last_hidden_state[0, 1:-1].numpy()
            assert token_vectors.shape == hidden.shape and len(offsets) == len(hidden)
            assert np.abs(token_vectors - hidden).max() < 1e-4
            pieces = tokenizer.convert_ids_to_tokens(ids[0, 1:-1].tolist())
            assert [text[a:b] for a, b in offsets] == [
                text[a:b] if piece == "[UNK]" else piece.removeprefix("##")
                for piece, (a, b) in zip(pieces, offsets, strict=True)
            ]
    assert ours(folder).encode_tokens([]) == []


def test_entities_of_real_words_are_learnt_from_token_vectors(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """An encoder near its first weights tells words apart: text in RadGraph's form in, entities out."""
    AutoTokenizer.from_pretrained(tiny_model("bert")).save_pretrained(tmp_path)
    BertForPreTraining(BertConfig(vocab_size=160, max_position_embeddings=64, **SIZES)).save_pretrained(tmp_path)
    rng = np.random.default_rng(1)
    phrases = (("heart", "ANAT-DP"), ("lungs", "ANAT-DP"), ("pleural effusion", "OBS-DP"), ("the", None), ("is", None))

    def document() -> dict[str, Any]:
        words: list[str] = []
        entities: dict[str, Any] = {}
        for text, label in (phrases[k] for k in rng.integers(len(phrases), size=5)):
            first = len(words)
            words += text.split()
            if label is not None:
                entities[str(len(entities))] = {"start_ix": first, "end_ix": len(words) - 1, "label": label}
        return {"text": " ".join(words), "entities": entities}

    backend = ours(tmp_path)
    sides = []
    for documents in ([document() for _ in range(40)], [document() for _ in range(20)]):
        vectors = backend.encode_tokens([one["text"] for one in documents])
        features = [
            word_vectors(one["text"], own.vectors, own.offsets) for one, own in zip(documents, vectors, strict=True)
        ]
        sides.append((features, [bio_tags(one) for one in documents]))
    (train, tags), (test, expected) = sides
    assert span_f1(TokenProbe().fit(train, tags).predict(test), expected) > 0.9


# --- pseudo-log-likelihoods


def test_a_continuation_is_scored_from_left_to_right_with_its_rest_masked(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    folder = tiny_model(kind)
    expected = [score_by_hand(folder, *pair) for pair in PAIRS]
    for size in (1, 3, 64):
        assert scores(ours(folder, batch_size=size), PAIRS) == pytest.approx(expected, abs=1e-4)


def test_scores_do_not_depend_on_the_batch_size(tiny_model: Callable[[str], Path], kind: str) -> None:
    one, many = (scores(ours(tiny_model(kind), batch_size=n), PAIRS) for n in (1, 64))
    assert one == pytest.approx(many, rel=1e-6, abs=1e-5)


def test_positions_that_count_from_the_padding_token_fit_to_the_last(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """RoBERTa: 64 positions, two of which no token has."""
    AutoTokenizer.from_pretrained(tiny_model("bert"), model_max_length=10**9).save_pretrained(tmp_path)
    RobertaForMaskedLM(
        RobertaConfig(vocab_size=160, max_position_embeddings=64, pad_token_id=1, **SIZES)
    ).save_pretrained(tmp_path)
    backend = ours(tmp_path)
    assert backend.max_length == 62
    assert math.isfinite(scores(backend, [(LONG, " yes")])[0])
    assert vectors(backend, [LONG]).shape == (1, 32)


def test_a_context_that_is_too_long_is_cut_from_its_left_and_counted(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("bert")
    backend = ours(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = len(tokenizer.encode(" yes", add_special_tokens=False))
    kept = tokenizer.encode(LONG, add_special_tokens=False)[-(64 - 2 - own) :]
    found = scores(backend, [(LONG, " yes"), (TEXTS[0], " yes"), (LONG, " yes")])
    assert found[0] == found[2] == pytest.approx(score_by_hand(folder, kept, " yes"), abs=1e-4)
    assert backend.describe()["prompts_cut"] == 1


@pytest.mark.parametrize("continuation", ["", " ", LONG])
def test_a_continuation_without_tokens_or_with_too_many_is_refused(
    tiny_model: Callable[[str], Path], continuation: str
) -> None:
    with pytest.raises(UserError, match="Expected a continuation of 1 to 62 tokens"):
        scores(ours(tiny_model("bert")), [("a", continuation)])


# --- classification of texts


def test_by_likelihood_a_label_is_what_the_text_adds_to_its_phrases(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("bert")
    backend = ours(folder)

    def gain(text: str, phrases: tuple[str, ...]) -> float:
        with_text, without = ([score_by_hand(folder, t, f" {p}") for p in phrases] for t in (text, ""))
        return float(np.mean(with_text) - np.mean(without))

    for text, found in zip(TEXTS[:2], classified(backend, LABELS, TEXTS[:2]), strict=True):
        expected = [gain(text, label.positive) - gain(text, label.negative) for label in LABELS.labels]
        assert list(found.margin) == pytest.approx(expected, abs=1e-4)
        assert list(found.probability) == pytest.approx([1 / (1 + math.exp(-m)) for m in expected], abs=1e-4)
        (options,) = classified(backend, OPTIONS, [text])
        a, b = (gain(text, label.positive) for label in OPTIONS.labels)
        assert options.probability == pytest.approx([1 / (1 + math.exp(b - a)), 1 / (1 + math.exp(a - b))], abs=1e-4)
        assert options.margin == pytest.approx([a - b, b - a], abs=1e-4)
    assert backend.describe()["classify_by"] == "likelihood"
    assert backend.describe()["probability_scale"] == "log-likelihood"


def test_by_similarity_a_label_is_the_cosine_with_its_phrases(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("bert")
    backend = ours(folder, classify_by="similarity")

    def cosine(text: str, phrases: tuple[str, ...]) -> float:
        mean = np.mean([mean_by_hand(folder, phrase) for phrase in phrases], axis=0)
        return float(mean_by_hand(folder, text) @ mean / np.linalg.norm(mean))

    for text, found in zip(TEXTS, classified(backend, LABELS), strict=True):
        expected = [cosine(text, label.positive) - cosine(text, label.negative) for label in LABELS.labels]
        assert list(found.margin) == pytest.approx(expected, abs=1e-5)
    assert backend.describe()["probability_scale"] == "no scale"
    assert all(sum(found.probability) == pytest.approx(1) for found in classified(backend, OPTIONS))


def test_without_a_head_texts_are_classified_by_similarity(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = sentence_folder(tiny_model, tmp_path / "sentences", pooling_mode_mean_tokens=True)
    backend = ours(folder)
    assert backend.classify_by == "similarity"
    assert len(classified(backend, LABELS)) == len(TEXTS)
    with pytest.raises(UserError, match="classify_by=likelihood cannot be used"):
        ours(folder, classify_by="likelihood")


# --- extraction


def summaries(backend: TextEncoderBackend, arguments: Sequence[Any]) -> list[str]:
    kwargs = {"until": ["."], "max_gen_toks": 1}
    return backend.generate_until([Instance("generate_until", {}, (one, kwargs), 0, ("t", 0, 1)) for one in arguments])


@pytest.mark.parametrize("count", [1, 2, 9])
def test_extracted_are_the_sentences_most_like_the_whole(tiny_model: Callable[[str], Path], count: int) -> None:
    folder = tiny_model("bert")
    sentences = ["The heart is normal.", "There is a small left pleural effusion.", "The lungs are clear."]
    vectors = [mean_by_hand(folder, sentence) for sentence in sentences]
    likeness = [float(vector @ np.mean(vectors, axis=0)) for vector in vectors]
    kept = sorted(sorted(range(3), key=lambda k: -likeness[k])[:count])
    backend = ours(folder, extractive=count)
    prompt = PromptWithFloors("Summarise!", {"copy": " ".join(sentences)})
    found = summaries(backend, [prompt, PromptWithFloors("Summarise!", {"copy": " "})])
    assert found == [" ".join(sentences[k] for k in kept), ""]
    assert isinstance(found[0], Generation) and found[0].finished
    assert backend.card.name.endswith(" extractive") and backend.describe()["extractive"] == count
    assert unsupported_reason(backend, type("Stock", (), {"OUTPUT_TYPE": "generate_until"})()) is None


def test_without_a_text_to_extract_from_the_task_is_named(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="Task t hands over no text to extract from"):
        summaries(ours(tiny_model("bert"), extractive=1), ["Summarise: ..."])


# --- what is refused


def test_a_model_without_a_trained_head_is_refused_for_likelihoods_with_the_reason(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = sentence_folder(tiny_model, tmp_path / "sentences", pooling_mode_mean_tokens=True)
    backend = ours(folder)
    assert not backend.loaded  # known from the names in the file

    class Choice:
        OUTPUT_TYPE = "multiple_choice"

    reason = unsupported_reason(backend, Choice())
    assert (
        reason is not None and "cannot answer loglikelihood requests: its checkpoint holds no trained masked" in reason
    )
    with pytest.raises(UserError, match="no trained masked-language-model head"):
        scores(backend, PAIRS)
    assert np.abs(vectors(backend, TEXTS) - vectors(ours(folder), TEXTS)).max() == 0


@pytest.mark.parametrize(
    ("output_type", "why"),
    [("generate_until", ": a masked language model writes nothing"), ("loglikelihood_rolling", "")],
)
def test_what_a_masked_model_has_no_answer_to_is_refused(
    tiny_model: Callable[[str], Path], output_type: str, why: str
) -> None:
    backend = ours(tiny_model("bert"))
    task = type("Stock", (), {"OUTPUT_TYPE": output_type})()
    reason = unsupported_reason(backend, task)
    assert reason is not None and f"cannot answer {output_type} requests{why}" in reason
    with pytest.raises(UserError, match=f"cannot answer `{output_type}` requests"):
        getattr(backend, output_type)([])


def test_images_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    image = ImageRef("ab" * 32, tmp_path / "x.png")
    backend = ours(tiny_model("bert"))
    for ask in (
        lambda: backend.embed([Instance("embed", {}, (image,), 0)]),
        lambda: backend.classify([Instance("classify", {}, (image, LABELS), 0)]),
    ):
        with pytest.raises(UserError, match="takes text alone"):
            ask()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_models_that_write_are_refused(tiny_model: Callable[[str], Path], kind: str) -> None:
    with pytest.raises(UserError, match=r"is no encoder-only model .* use --model medvlm-lm"):
        ours(tiny_model(kind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bert.encoder.layer.0.output.dense.weight"), "1 keys missing, 0 unexpected"),
        (lambda s: s.pop("cls.predictions.transform.dense.weight"), "1 keys missing, 0 unexpected"),
        (lambda s: s.update({"bert.encoder.layer.2.output.dense.bias": torch.zeros(32)}), "0 keys missing, 1 unexp"),
    ],
)
def test_half_an_encoder_or_half_a_head_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tiny_model("bert"), folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        ours(folder).ensure_loaded()


def test_heads_for_other_tasks_are_left_aside(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BERT as published: with a pooler and a next-sentence head."""
    AutoTokenizer.from_pretrained(tiny_model("bert")).save_pretrained(tmp_path)
    BertForPreTraining(BertConfig(vocab_size=160, max_position_embeddings=64, **SIZES)).save_pretrained(tmp_path)
    backend = ours(tmp_path)
    with caplog.at_level(logging.INFO, "lm_eval.medvlm"):
        assert scores(backend, PAIRS[:2]) == pytest.approx(
            [score_by_hand(tmp_path, *pair) for pair in PAIRS[:2]], abs=1e-4
        )
    assert "4 tensors of other heads are not used" in caplog.text


def test_the_first_berts_files_are_read(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """torch's format before 1.6, with the parameters of LayerNorm named as in TensorFlow."""
    folder = tmp_path / "old"
    shutil.copytree(tiny_model("bert"), folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert scores(ours(folder), PAIRS) == scores(ours(tiny_model("bert")), PAIRS)
    assert ours(folder, precision="checkpoint").precision == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower_case": "maybe"}, "lower_case to be True, False or auto"),
        ({"classify_by": "vibes"}, "classify_by to be auto, likelihood or similarity"),
        ({"gguf_file": "x.gguf"}, "reads no GGUF files"),
        ({"extractive": 0}, "extractive to be 1 sentence or more"),
    ],
)
def test_wrong_options_are_told(tiny_model: Callable[[str], Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours(tiny_model("bert"), **options)


# --- capitals


@pytest.fixture
def bare(tmp_path: Path) -> Callable[[list[str]], Path]:
    """A BERT with nothing but a vocab.txt, as Bio_ClinicalBERT is published."""

    def make(words: list[str]) -> Path:
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **SIZES, initializer_range=0.5)
        BertForPreTraining(config).save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
        return tmp_path

    return make


CASED = ["The", "the", "Heart", "heart", "is", "large"]


def test_a_bare_vocabulary_with_capitals_keeps_the_texts_case_and_says_so(
    bare: Callable[[list[str]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = bare(CASED)
    assert AutoTokenizer.from_pretrained(folder).tokenize("The Heart") == ["the", "heart"]  # the trap
    with caplog.at_level(logging.WARNING, "lm_eval.medvlm"):
        backend = ours(folder)
        assert backend.tokenizer.tokenize("The Heart") == ["The", "Heart"]
    assert "has a vocabulary with capitals" in caplog.text
    assert backend.describe()["lower_case"] is False
    assert np.abs(vectors(backend, ["The Heart"]) - vectors(backend, ["the heart"])).max() > 1e-3


def test_lower_case_is_as_asked(bare: Callable[[list[str]], Path]) -> None:
    backend = ours(bare(CASED), lower_case=True)
    assert backend.tokenizer.tokenize("The Heart") == ["the", "heart"]
    assert vectors(backend, ["The Heart"]) == pytest.approx(vectors(backend, ["the heart"]), abs=0)


@pytest.mark.parametrize("words", [CASED, [word.lower() for word in CASED[1::2]]])
def test_files_that_say_it_or_a_vocabulary_without_capitals_are_followed(
    bare: Callable[[list[str]], Path], words: list[str]
) -> None:
    folder = bare(words)
    if words is CASED:
        settings = {"do_lower_case": True, "tokenizer_class": "BertTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    backend = ours(folder)
    assert backend.lower_case is None
    assert backend.tokenizer.tokenize("The Heart") == AutoTokenizer.from_pretrained(folder).tokenize("The Heart")


# --- the store, and whole runs


def test_what_is_stored_loads_no_model_and_is_the_same(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(backend: TextEncoderBackend) -> Any:
        return vectors(backend, TEXTS).tolist(), scores(backend, [*PAIRS, (LONG, " yes")]), classified(backend, LABELS)

    first = ours(tiny_model("bert"), store="auto")
    expected = ask(first)
    first.learn()
    monkeypatch.setattr(TextEncoderBackend, "load", lambda self: pytest.fail("the model was loaded"))
    second = ours(tiny_model("bert"), store="auto")
    assert ask(second) == expected
    described = second.describe()
    assert (described["texts_encoded"], described["scored"], described["prompts_cut"]) == (0, 0, 1)
    assert described["texts_recalled"] == len(TEXTS)
    assert described["scores_recalled"] == first.describe()["scored"]


def test_a_stock_choice_task_runs_and_a_writing_one_says_why_not(
    tiny_model: Callable[[str], Path], stock_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stock_folder / "writing.yaml").write_text(
        (stock_folder / "stock.yaml")
        .read_text()
        .replace("stock_task", "writing_task")
        .replace("multiple_choice", "generate_until")
        .replace('doc_to_choice: ["yes", "no"]\n', "")
        .replace("metric: acc", "metric: exact_match")
    )
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    folder = tiny_model("bert")
    results = lm_eval.simple_evaluate(
        model="medvlm-text-encoder",
        model_args=f"pretrained={folder}",
        tasks=["stock_task", "writing_task"],
        task_manager=TaskManager(include_path=str(stock_folder)),
        device="cpu",
        bootstrap_iters=0,
    )
    assert (
        results["results"]["writing_task"]["unsupported,none"]
        .partition(":")[0]
        .endswith("cannot answer generate_until requests")
    )
    right = []
    for sample in results["samples"]["stock_task"]:
        question = sample["doc"]["question"]
        by_hand = [score_by_hand(folder, question, f" {choice}") for choice in ("yes", "no")]
        right.append(int(np.argmax(by_hand)) == sample["doc"]["answer"])
    assert results["results"]["stock_task"]["acc,none"] == pytest.approx(np.mean(right))
