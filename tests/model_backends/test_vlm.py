"""`medvlm-vlm` against transformers itself, one request at a time, on tiny models of four kinds."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from medvlm_harness.data.images import open_reference
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.vlm import VlmBackend
from medvlm_harness.perturbations.image import Case, find_corruption
from medvlm_harness.requests import ImageRef
from medvlm_harness.store import Store

KINDS = ("llava", "qwen2_vl", "gemma3", "idefics3")
QUESTION, ANSWERS = "is the heart normal", (" yes", "no, enlarged", "?")
LENGTH = 10


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model(str(request.param))


def ours(folder: Path, **options: Any) -> VlmBackend:
    return VlmBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})


def generate(prompts: Sequence[tuple[str, Sequence[ImageRef]]], **kwargs: Any) -> list[Instance]:
    given = {"max_gen_toks": LENGTH, **kwargs}
    return [
        Instance("generate_until", {}, (text, given, {"visual": list(refs)}), k, ("task", k, 1))
        for k, (text, refs) in enumerate(prompts)
    ]


def scored(prompts: Sequence[tuple[str, str, Sequence[ImageRef]]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (text, answer, {"visual": list(refs)}), k)
        for k, (text, answer, refs) in enumerate(prompts)
    ]


class Plain:
    """Transformers' own classes, one prompt at a time, and nothing shared."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def encode(self, text: str, refs: Sequence[ImageRef]) -> dict[str, torch.Tensor]:
        content = [*({"type": "image"} for _ in refs), {"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        conversation = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        pictures = [[Image.open(ref.path).convert("RGB") for ref in refs]]
        return dict(self.processor(text=[conversation], images=pictures, add_special_tokens=False, return_tensors="pt"))

    @torch.no_grad()
    def likelihood(self, text: str, answer: str, refs: Sequence[ImageRef]) -> float:
        given = self.encode(text, refs)
        length = given["input_ids"].shape[1]
        ids = torch.tensor([self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]])
        given["input_ids"] = torch.cat([given["input_ids"], ids], dim=1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        for name in {"token_type_ids", "mm_token_type_ids"} & given.keys():
            given[name] = torch.cat([given[name], torch.zeros_like(ids)], dim=1)
        logits = self.model(**given).logits[0, length - 1 : -1].log_softmax(-1)
        return float(logits.gather(1, ids[0][:, None]).sum())

    @torch.no_grad()
    def text(self, text: str, refs: Sequence[ImageRef]) -> str:
        given = self.encode(text, refs)
        tokens = self.model.generate(**given, max_new_tokens=LENGTH, do_sample=False)[0, given["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))


def test_log_likelihoods_are_those_of_transformers_at_every_batch_size(
    folder: Path, images: Callable[..., list[ImageRef]]
) -> None:
    refs = images(3)
    prompts = [(QUESTION, answer, chosen) for answer in ANSWERS for chosen in ([refs[0]], [refs[1]], refs[1:])]
    plain = Plain(folder)
    expected = [plain.likelihood(*prompt) for prompt in prompts]
    assert len({round(value, 3) for value in expected}) == len(prompts), "every image and answer must matter"
    for batch_size in (1, 4):
        found = ours(folder, batch_size=batch_size).loglikelihood(scored(prompts))
        assert [score for score, _ in found] == pytest.approx(expected, abs=1e-4)


def test_greedy_texts_are_those_of_transformers_at_every_batch_size(
    folder: Path, images: Callable[..., list[ImageRef]]
) -> None:
    refs = images(3)
    prompts = [
        (QUESTION, [refs[0]]),
        (QUESTION, [refs[1]]),
        ("compare", refs[1:]),
        ("a longer question than", [refs[2]]),
    ]
    plain = Plain(folder)
    expected = [plain.text(*prompt) for prompt in prompts]
    for batch_size in (1, 3):
        found = ours(folder, batch_size=batch_size).generate_until(generate(prompts))
        # Transformers leaves what lm-eval takes for a stop string: the text of the end token.
        assert [str(text) for text in found] == [text.partition("</s>")[0] for text in expected]


def test_a_perturbed_image_is_answered_as_a_file_of_its_pixels(
    folder: Path, images: Callable[..., list[ImageRef]], tmp_path: Path
) -> None:
    clean = images(2, size=(48, 48))
    noisy = [ImageRef(ref, ref.path, Case(find_corruption("gaussian_noise", "chest"), 5)) for ref in clean]
    written = []
    for k, ref in enumerate(noisy):
        path = tmp_path / f"{k}.png"
        open_reference(ref).save(path)
        written.append(ImageRef(hashlib.sha256(path.read_bytes()).hexdigest(), path))

    def answers(refs: Sequence[ImageRef], batch_size: int = 1) -> list[float]:
        backend = ours(folder, batch_size=batch_size)
        return [score for score, _ in backend.loglikelihood(scored([(QUESTION, ANSWERS[0], [ref]) for ref in refs]))]

    expected = answers([*clean, *written])
    assert len({round(value, 3) for value in expected}) == 4, "the noise must matter"
    assert answers([*clean, *noisy]) == pytest.approx(expected, abs=1e-5)
    assert answers([*noisy, *clean], batch_size=3) == pytest.approx(expected[2:] + expected[:2], abs=1e-4)


def test_marked_places_decide_where_images_go(folder: Path, images: Callable[..., list[ImageRef]]) -> None:
    first, second = images(2)
    backend = ours(folder)
    before, marked, after, swapped = (
        backend.encode_turn(text, refs)
        for text, refs in (
            ("now this", [first, second]),
            ("<image><image>now this", [first, second]),
            ("now <image>this<image>", [first, second]),
            ("now this", [second, first]),
        )
    )
    assert before == marked
    assert after.image_end > before.image_end
    assert swapped != before
    with pytest.raises(UserError, match="1 places for images"):
        backend.encode_turn("<image>", [first, second])


def test_what_lm_eval_put_into_the_chat_template_is_taken_as_it_is(
    folder: Path, images: Callable[..., list[ImageRef]]
) -> None:
    (ref,) = images(1)
    backend = ours(folder)
    own = backend.encode_turn(QUESTION, [ref])
    prompt = backend.apply_chat_template([{"role": "user", "content": f"<image>{QUESTION}"}])
    assert backend.encode_turn(prompt, [ref]) == own


def test_without_a_template_the_text_follows_the_image(
    tiny_model: Callable[[str], Path], images: Callable[..., list[ImageRef]]
) -> None:
    (ref,) = images(1)
    backend = ours(tiny_model("llava"), chat_template="none", system="be brief")
    ids = backend.encode_turn(QUESTION, [ref]).ids
    text = backend.tokenizer.decode(ids).replace("<image>", "")
    assert text == f"<s>be brief\n\n\n{QUESTION}"
    assert sum(token == backend.config.image_token_id for token in ids) == 16
    named = backend.encode_turn(f"<image>\n{QUESTION}", [ref])
    assert named.ids == ids, "a prompt that names the image's place is taken as it is"
    assert backend.describe()["chat_template"] is None


def test_an_answer_is_stored_under_its_images_and_its_template(
    tiny_model: Callable[[str], Path], images: Callable[..., list[ImageRef]], tmp_path: Path
) -> None:
    refs, folder, store = images(2), tiny_model("llava"), str(tmp_path / "store.sqlite")
    first = ours(folder, store=store)
    texts = first.generate_until(generate([(QUESTION, [refs[0]])]))
    again = ours(folder, store=store)
    assert again.generate_until(generate([(QUESTION, [refs[0]])])) == texts
    assert (again.generated, again.generations_recalled, again.loaded) == (0, 1, False)
    other = ours(folder, store=store)
    other.generate_until(generate([(QUESTION, [refs[1]])]))
    bare = ours(folder, store=store, chat_template="none")
    bare.generate_until(generate([(QUESTION, [refs[0]])]))
    assert (other.generated, bare.generated) == (1, 1)
    assert Store(Path(store)) is not None


def test_images_that_do_not_fit_are_refused_and_text_is_cut(
    tiny_model: Callable[[str], Path], images: Callable[..., list[ImageRef]]
) -> None:
    (ref,) = images(1)
    backend = ours(tiny_model("llava"), max_length=20)
    with pytest.raises(UserError, match="use fewer images"):
        backend.generate_until(generate([(QUESTION, [ref])]))
    backend.generate_until(generate([("heart " * 30, [])]))
    assert backend.prompts_cut == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": "mine"}, "auto or none"),
        ({"answer_scoring": "last"}, "full or first-token"),
    ],
)
def test_a_wrong_option_is_one_line(tiny_model: Callable[[str], Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours(tiny_model("llava"), **options)


def test_models_of_other_kinds_are_sent_to_their_backend(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="medvlm-lm"):
        ours(tiny_model("llama"))
    with pytest.raises(UserError, match="medvlm-vlm"):
        LanguageModelBackend(pretrained=str(tiny_model("llava")), device="cpu", store="off")


def test_a_folder_without_an_image_processor_says_so(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model("llava"), broken)
    (broken / "processor_config.json").unlink()
    with pytest.raises(UserError, match="processor"):
        _ = ours(broken).processor
