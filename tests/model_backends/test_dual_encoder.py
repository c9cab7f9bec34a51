from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL.Image import Image

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard, Prompts
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts
from medvlm_harness.model_backends.image_vectors import unit
from medvlm_harness.model_backends.torch_backend import pick_device
from medvlm_harness.requests import ImageRef, LabelSet, TextRef

Requests = Callable[..., list[Instance]]
WIDTH, SCALE = 6, 7.0
MULTILABEL = LabelSet.from_config(
    "findings",
    {
        "Edema": {"positive": ["edema", "pulmonary edema", "wet lungs"], "negative": ["no edema", "dry lungs"]},
        "Fracture": {"positive": ["fracture"], "negative": ["no fracture"]},
    },
)
MULTICLASS = LabelSet.from_config(
    "views", {"kind": "multiclass", "options": {"frontal": "front", "lateral": "side", "other": "else"}}
)


def text_vector(text: str) -> np.ndarray:
    """Of any length, different for each text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return 3 * np.random.default_rng(seed).standard_normal(WIDTH)


class Counting(DualEncoder):
    """Random projections that count what is decoded and encoded."""

    card: ModelCard = ModelCard(name="counting", family="dual encoder")
    bad: ClassVar[dict[str, float]] = {}

    def load(self) -> None:
        self.logit_scale = SCALE
        self.lock = threading.Lock()
        self.decoded = self.waiting = self.most_waiting = 0
        self.batches: list[int] = []
        self.texts: list[str] = []
        self.matrix = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(0))

    def preprocess(self, image: Image) -> torch.Tensor:
        with self.lock:
            self.decoded += 1
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        return torch.from_numpy(np.array(image.convert("L").resize((48, 1)), dtype=np.float32)) / 255 - 0.5

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.waiting -= len(pixels)
        self.batches.append(len(pixels))
        return pixels.flatten(1) @ self.matrix

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        self.texts += texts
        vectors = np.array([text_vector(text) * self.bad.get(text, 1.0) for text in texts])
        return EncodedTexts(torch.from_numpy(vectors), [len(text) > 20 for text in texts])


def normalised(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def image_vectors(model: DualEncoder, refs: list[ImageRef], embed_requests: Requests) -> np.ndarray:
    return np.array([e.vector for e in model.embed(embed_requests(refs))], dtype=np.float64)


# --- encoding


def test_a_model_without_token_ids_says_so() -> None:
    model = Counting(pretrained="x", device="cpu")
    with pytest.raises(UserError, match="counting takes texts, not token ids"):
        model.text_features(torch.zeros(1, 3, dtype=torch.int64))
    pixels = torch.rand(2, 1, 48)
    model.ensure_loaded()
    assert torch.equal(model.image_features(pixels), pixels.flatten(1) @ model.matrix)


def test_batch_size_does_not_matter(images: Callable[..., list[ImageRef]], embed_requests: Requests) -> None:
    requests = embed_requests([*images(70), *(f"text {k}" for k in range(70))])
    one, many = Counting(pretrained="x", device="cpu", batch_size=1), Counting(pretrained="x", device="cpu")
    a, b = ([e.vector for e in model.embed(requests)] for model in (one, many))
    assert np.abs(np.array(a) - np.array(b)).max() < 1e-5
    assert one.batches == [1] * 70
    assert many.batches == [64, 6]


def test_an_image_that_three_tasks_ask_for_is_decoded_and_encoded_once(
    images: Callable[..., list[ImageRef]], embed_requests: Requests, classify_requests: Requests
) -> None:
    model, refs = Counting(pretrained="x", device="cpu", batch_size=4), images(10)
    copies = [ImageRef(str(ref), ref.path) for ref in refs]
    model.embed(embed_requests([*refs, *copies, "report"]))
    model.classify(classify_requests(copies, MULTILABEL))
    model.classify(classify_requests(refs[::-1], MULTICLASS))
    model.embed(embed_requests([TextRef("report"), "report"]))
    assert model.decoded == sum(model.batches) == model.images_encoded == 10
    assert sorted(model.texts) == sorted(set(model.texts))
    assert model.texts.count("report") == 1
    assert model.texts_encoded == len(model.texts)
    # Negative control: another image is decoded.
    other = ImageRef(str(images(11)[10]), images(11)[10].path)
    model.embed(embed_requests([other]))
    assert model.decoded == 11


@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_stays_at_most_two_batches_ahead(
    images: Callable[..., list[ImageRef]], embed_requests: Requests, threads: int
) -> None:
    model = Counting(pretrained="x", device="cpu", batch_size=4, decode_threads=threads)
    model.embed(embed_requests(images(60)))
    assert 4 <= model.most_waiting <= 2 * 4 + 2 * threads < 60
    assert model.batches == [4] * 15


def test_answers_come_in_the_order_of_the_requests(
    images: Callable[..., list[ImageRef]], embed_requests: Requests, classify_requests: Requests
) -> None:
    refs = images(9)
    forward = Counting(pretrained="x", device="cpu", batch_size=2)
    backward = Counting(pretrained="x", device="cpu", batch_size=4)
    arguments: list[Any] = [refs[3], "a longer text", refs[0], "a", refs[3]]
    one = [e.vector for e in forward.embed(embed_requests(arguments))]
    other = [e.vector for e in backward.embed(embed_requests(arguments[::-1]))][::-1]
    assert np.allclose(one, other, rtol=0, atol=1e-6)
    assert np.array_equal(one[0], one[4])
    mixed = classify_requests(refs, MULTILABEL) + classify_requests(refs[::-1], MULTICLASS)
    mixed = mixed[::2] + mixed[1::2]
    together = forward.classify(mixed)
    alone = [backward.classify([request])[0] for request in mixed]
    assert all(
        np.allclose(a.probability, b.probability, rtol=0, atol=1e-6) for a, b in zip(together, alone, strict=True)
    )


def test_vectors_have_unit_length_and_texts_say_whether_they_were_cut(
    images: Callable[..., list[ImageRef]], embed_requests: Requests
) -> None:
    model = Counting(pretrained="x", device="cpu")
    answers = model.embed(embed_requests([images(1)[0], "short", "much longer than twenty letters"]))
    assert all(e.vector.dtype == np.float32 for e in answers)
    assert np.allclose([np.linalg.norm(e.vector) for e in answers], 1, atol=1e-6)
    assert np.allclose(answers[1].vector, normalised(text_vector("short")), atol=1e-6)
    assert [e.truncated for e in answers] == [None, False, True]


# --- scores


def test_multilabel_scores_equal_the_definition(
    images: Callable[..., list[ImageRef]], embed_requests: Requests, classify_requests: Requests
) -> None:
    model, refs = Counting(pretrained="x", device="cpu"), images(5)
    scores = model.classify(classify_requests(refs, MULTILABEL))
    for image, answer in zip(image_vectors(model, refs, embed_requests), scores, strict=True):
        for j, label in enumerate(MULTILABEL.labels):
            yes = normalised(np.mean([normalised(text_vector(x)) for x in label.positive], axis=0))
            no = normalised(np.mean([normalised(text_vector(x)) for x in label.negative], axis=0))
            assert answer.margin[j] == pytest.approx(image @ yes - image @ no, abs=1e-6)
            pair = np.exp([SCALE * (image @ yes), SCALE * (image @ no)])
            assert answer.probability[j] == pytest.approx(pair[0] / pair.sum(), abs=1e-6)
    # Negative control: without renormalising the mean, the first label's margin would be another.
    raw = np.mean([normalised(text_vector(x)) for x in MULTILABEL.labels[0].positive], axis=0)
    assert abs(np.linalg.norm(raw) - 1) > 0.05


def test_multiclass_probabilities_are_the_softmax_and_margins_its_log_odds_per_scale(
    images: Callable[..., list[ImageRef]], embed_requests: Requests, classify_requests: Requests
) -> None:
    model, refs = Counting(pretrained="x", device="cpu"), images(5)
    options = [normalised(text_vector(phrase)) for phrase in ("front", "side", "else")]
    scores = model.classify(classify_requests(refs, MULTICLASS))
    for image, answer in zip(image_vectors(model, refs, embed_requests), scores, strict=True):
        weights = np.exp(SCALE * np.array([image @ option for option in options]))
        expected = weights / weights.sum()
        assert np.allclose(answer.probability, expected, atol=1e-6)
        assert sum(answer.probability) == pytest.approx(1, abs=1e-9)
        assert np.allclose(SCALE * np.array(answer.margin), np.log(expected / (1 - expected)), atol=1e-5)


def test_margins_keep_ranking_where_probabilities_saturate(
    images: Callable[..., list[ImageRef]], classify_requests: Requests
) -> None:
    model = Counting(pretrained="x", device="cpu")
    model.learn()
    model.logit_scale = 300.0
    refs = images(8)
    for labels in (MULTILABEL, MULTICLASS):
        scores = model.classify(classify_requests(refs, labels))
        assert np.isfinite([s.margin for s in scores]).all()
        assert all(0 <= p <= 1 for s in scores for p in s.probability)
        assert len({s.margin[0] for s in scores}) == 8


def test_a_card_without_a_scale_leaves_cosines_as_they_are(
    images: Callable[..., list[ImageRef]], classify_requests: Requests
) -> None:
    class Unscaled(Counting):
        card = ModelCard(name="unscaled", family="dual encoder", probability_scale="no scale")

    for answer in Unscaled(pretrained="x", device="cpu").classify(classify_requests(images(3), MULTILABEL)):
        assert np.allclose(answer.probability, 1 / (1 + np.exp(-np.array(answer.margin))), atol=1e-9)


def test_published_prompts_replace_the_tasks(
    images: Callable[..., list[ImageRef]], classify_requests: Requests
) -> None:
    class Pairs(Counting):
        card = ModelCard(name="p", family="dual encoder", prompts=Prompts(("{}", "an x-ray of {}"), ("no {}",)))

    class PositivesOnly(Counting):
        card = ModelCard(name="p", family="dual encoder", prompts=Prompts(("a photo of {}",)))

    requests = classify_requests(images(1), MULTILABEL)
    pairs, positives = (kind(pretrained="x", device="cpu", prompts="published") for kind in (Pairs, PositivesOnly))
    pairs.classify(requests)
    positives.classify(requests)
    names = ("Edema", "Fracture")
    assert set(pairs.texts) == {t.format(n) for n in names for t in ("{}", "an x-ray of {}", "no {}")}
    negatives = ("no edema", "dry lungs", "no fracture")
    assert set(positives.texts) == {f"a photo of {x}" for x in (*names, *negatives)}
    assert pairs.describe()["prompts"] == "published"
    task = Pairs(pretrained="x", device="cpu")
    task.classify(requests)
    assert set(task.texts) == {x for label in MULTILABEL.labels for x in (*label.positive, *label.negative)}


def test_published_templates_take_an_options_phrase_and_not_its_code(
    images: Callable[..., list[ImageRef]], classify_requests: Requests
) -> None:
    class Published(Counting):
        card = ModelCard(name="p", family="dual encoder", prompts=Prompts(("a photo of {}",), ("no {}",)))

    grades = LabelSet.from_config(
        "grades", {"kind": "multiclass", "options": {"0": "a clear lung", "1": "an effusion"}}
    )
    model = Published(pretrained="x", device="cpu", prompts="published")
    model.classify(classify_requests(images(1), grades))
    assert sorted(model.texts) == ["a photo of a clear lung", "a photo of an effusion"]


# --- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=x,prompts=both", "Expected prompts to be task, published or ours"),
        ("pretrained=x,prompts=published", "no published prompts"),
        ("pretrained=x,decode_threads=0", "decode_threads"),
        ("pretrained=x,decode_threads=two", "decode_threads.*'two'"),
        ("pretrained=x,batch_size=0", "batch_size"),
        ("pretrained=x,max_batch_size=most", "max_batch_size.*'most'"),
        ("pretrained=x,batch_size=many", "batch_size.*'many'"),
        ("pretrained=x,device=tpu9", "device.*'tpu9'"),
        ("pretrained=x,promts=task", r"Unknown option 'promts'.* Did you mean prompts, prompts_file\?"),
        ("device=cpu", "needs pretrained="),
    ],
)
def test_wrong_options_say_what_was_expected(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Counting.create_from_arg_string(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a machine without CUDA ignores what lm-eval asks for")
@pytest.mark.parametrize("device", [None, "", "auto", "cuda", "cuda:0"])
def test_lm_evals_default_device_means_choose_where_there_is_no_cuda(device: str | None) -> None:
    assert pick_device(device) == torch.device("cpu")


def test_a_changed_image_is_refused(images: Callable[..., list[ImageRef]], embed_requests: Requests) -> None:
    refs = images(3)
    refs[1].path.write_bytes(refs[2].path.read_bytes())
    with pytest.raises(UserError, match=r"1\.png changed since it was prepared") as error:
        Counting(pretrained="x", device="cpu", batch_size=1).embed(embed_requests(refs))
    assert "\n" not in str(error.value)


def test_a_deleted_image_is_refused(images: Callable[..., list[ImageRef]], classify_requests: Requests) -> None:
    refs = images(30)
    refs[25].path.unlink()
    with pytest.raises(UserError, match=r"25\.png cannot be read") as error:
        Counting(pretrained="x", device="cpu", batch_size=4).classify(classify_requests(refs, MULTILABEL))
    assert "\n" not in str(error.value)
    assert threading.active_count() < 10  # the worker threads are gone


@pytest.mark.parametrize("factor", [0.0, np.nan, np.inf])
def test_an_embedding_without_a_direction_is_refused(
    factor: float, embed_requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Counting.bad, "broken", factor)
    with pytest.raises(UserError, match="zero or not finite"):
        Counting(pretrained="x", device="cpu").embed(embed_requests(["fine", "broken"]))


def test_phrases_that_cancel_have_no_mean() -> None:
    with pytest.raises(UserError, match="zero or not finite"):
        unit(np.stack([np.mean([[1.0, 0.0], [-1.0, 0.0]], axis=0)]))


def test_the_description_hashes_the_weights(tmp_path: Path) -> None:
    assert Counting(pretrained="x", device="cpu").describe()["weights_sha256"] is None
    paths = [tmp_path / name for name in ("a.bin", "b.bin")]
    for path in paths:
        path.write_bytes(path.name.encode())
    hashes = {path.name: hashlib.sha256(path.name.encode()).hexdigest() for path in paths}

    def described(files: list[Path]) -> dict[str, Any]:
        class FromFiles(Counting):
            def locate(self) -> Checkpoint:
                return Checkpoint(tuple(files))

        return FromFiles(pretrained="x", device="cpu").describe()

    assert described(paths[:1])["weights_sha256"] == hashes["a.bin"]
    assert described(paths)["weight_files_sha256"] == hashes
    both = described(paths)["weights_sha256"]
    assert described(paths[::-1])["weights_sha256"] == both not in hashes.values()
