"""`medvlm-vlm`: any image-text-to-text model that transformers builds without remote code."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from PIL import Image

from medvlm_harness.data.images import open_reference
from medvlm_harness.errors import UserError, first_line
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.image_preparation import ImagePreparation
from medvlm_harness.model_backends.sequences import Prompt
from medvlm_harness.model_backends.vision_language import IMAGE_PLACE, VisionLanguageBackend, turn_parts
from medvlm_harness.requests import ImageRef

__all__ = ["VlmBackend", "decoded"]

_log = logging.getLogger("lm_eval.medvlm")

ChatTemplate = Literal["auto", "none"]


class VlmBackend(VisionLanguageBackend):
    """A folder as transformers saves a model with its processor: Qwen2.5-VL, SmolVLM, MedGemma, LLaVA and others.

    The model's own chat template is applied to every turn (`chat_template=none` leaves it out, `system=` adds a
    system turn); a prompt to which lm-eval applied it already (--apply_chat_template) is taken as it is. Images become
    RGB before the model's own processor prepares them. A model without a template gets the images, a line break and the
    text.
    """

    card: ModelCard = backend_card("medvlm-vlm")

    def __init__(self, *, chat_template: ChatTemplate = "auto", system: str | None = None, **options: Any) -> None:
        if chat_template not in ("auto", "none"):
            raise UserError(f"Expected chat_template to be auto or none, but got {chat_template!r}.")
        self.chat_template_asked, self.system = chat_template, None if system is None else str(system)
        self._from_caller: set[str] = set()  # prompts that lm-eval put into the template
        super().__init__(**options)

    # --- files

    def model_class(self) -> Any:
        """Transformers' own choice by the configuration.

        Raises:
            UserError: if it knows no such image-text-to-text model, or one with an encoder for its texts.
        """
        from transformers import AutoModelForImageTextToText
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        kind = self.config.model_type
        if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise UserError(
                f"{self.pretrained} is no image-text-to-text model that transformers knows ({kind}): language models "
                "take --model medvlm-lm, dual encoders --model medvlm-clip, LLaVA-Med 1.5 --model llava-med."
            )
        if self.is_seq2seq or not isinstance(getattr(self.config, "image_token_id", None), int):
            raise UserError(
                f"{self.pretrained} ({kind}) has no places for images among its tokens, which medvlm-vlm needs."
            )
        return AutoModelForImageTextToText

    @cached_property
    def processor(self) -> Any:
        """Transformers' processor, whose images are prepared once for several prompts in a row."""
        from transformers import AutoProcessor

        with self._one_line("processor"):
            processor = AutoProcessor.from_pretrained(self.folder, **self._source)
        if getattr(processor, "image_processor", None) is None:
            raise UserError(f"{self.pretrained} holds no image processor (preprocessor_config.json).")
        processor.image_processor = _PreparedOnce(processor.image_processor)
        return processor

    @cached_property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def preprocessing(self) -> dict[str, Any]:
        """Adds the template and the system turn."""
        return {**super().preprocessing(), "chat_template": self.chat_template_asked, "system": self.system}

    # --- conversations

    @property
    def _template(self) -> str | None:
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        return template if self.chat_template_asked == "auto" else None

    @property
    def image_marker(self) -> str:
        """What the processor takes for an image in a text."""
        marker = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        if not isinstance(marker, str):
            raise UserError(f"The processor of {self.pretrained} does not say what marks an image in a text.")
        return marker

    def encode_turn(self, text: str, images: Sequence[ImageRef]) -> Prompt:
        """In the chat template, unless lm-eval did that."""
        conversation = text if text in self._from_caller else self._conversation(text, len(images))
        pictures = [decoded(image, self.preparation) for image in images]
        given = {"images": [pictures]} if pictures else {}
        try:
            encoded = self.processor(text=[conversation], add_special_tokens=self._adds(conversation), **given)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"The processor of {self.card.name} refuses a prompt with {len(images)} images: {first_line(error)}"
            ) from error
        ids = tuple(int(token) for token in encoded["input_ids"][0])
        places = [place for place, token in enumerate(ids) if token == self.config.image_token_id]
        if images and not places:
            raise UserError(f"The chat template of {self.card.name} leaves no place for images.")
        return Prompt(ids, images=tuple(images), image_end=places[-1] + 1 if places else 0)

    def _conversation(self, text: str, images: int) -> str:
        parts = turn_parts(text, images)
        if self._template is None:
            marked = "".join(self.image_marker if part is None else part for part in parts)
            if images and IMAGE_PLACE not in text:
                marked = f"{self.image_marker * images}\n{text}"
            return f"{self.system}\n\n{marked}" if self.system else marked
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        return self._templated([*system, {"role": "user", "content": content}], add_generation_prompt=True)

    def _templated(self, history: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError

        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.processor.apply_chat_template(history, tokenize=False, **options))
        except (TemplateError, TypeError) as error:
            raise UserError(f"The chat template of {self.card.name} refuses the conversation: {error}") from error

    def _adds(self, conversation: str) -> bool:
        """Whether the tokenizer is to add its special tokens: not where the template wrote the first one."""
        begin = self.tokenizer.bos_token
        return not (begin and conversation.startswith(begin))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that lm-eval writes into results."""
        if chat_template and self._template is None:
            raise UserError(f"{self.card.name} has no chat template: leave out --apply_chat_template.")
        return self._template if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation of lm-eval's as one prompt; `<image>` in its texts marks the places of images."""
        history = [
            {
                "role": turn["role"],
                "content": [
                    {"type": "image"} if part is None else {"type": "text", "text": part}
                    for part in turn_parts(turn["content"], turn["content"].count(IMAGE_PLACE))
                ],
            }
            for turn in chat_history
        ]
        prompt = self._templated(history, add_generation_prompt=add_generation_prompt)
        self._from_caller.add(prompt)
        return prompt

    # --- pixels

    def stack(self, prompts: Sequence[Prompt], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels of all images, and what marks their places among the tokens."""
        pictures = [
            [decoded(image, self.preparation) for image in prompt.images] for prompt in prompts if prompt.images
        ]
        if not pictures:
            return {}
        marked = (ids.to(self._device) == self.config.image_token_id).long()
        marks = {name: marked if is_image else torch.zeros_like(marked) for name, is_image in self._marks.items()}
        prepared = self._prepared(pictures)
        return {**marks, **{name: self._moved(value) for name, value in prepared.items() if name not in marks}}

    def _prepared(self, pictures: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        texts = [self.image_marker * len(own) for own in pictures]
        given = self.processor(text=texts, images=[list(own) for own in pictures], padding=True, return_tensors="pt")
        return {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask")}

    @cached_property
    def _marks(self) -> dict[str, bool]:
        """Inputs with one number per token that the processor gives: whether they mark images, or are all 0.

        Raises:
            UserError: for one that does neither: what it would be for padded tokens is not known.
        """
        with self._one_line("processor"):
            given = self.processor(text=[self.image_marker], images=[[Image.new("RGB", (64, 64))]], return_tensors="pt")
        ids = given["input_ids"]
        found: dict[str, bool] = {}
        for name, value in given.items():
            if name in ("input_ids", "attention_mask") or value.shape != ids.shape or value.is_floating_point():
                continue
            is_image = bool((value == (ids == self.config.image_token_id)).all())
            if not is_image and bool(value.any()):
                raise UserError(f"The processor of {self.pretrained} gives {name}, which medvlm-vlm does not know.")
            found[name] = is_image
        return found

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._device, self.dtype if value.is_floating_point() else value.dtype)

    def forget(self) -> None:
        """Adds the images that were opened and prepared last."""
        super().forget()
        decoded.cache_clear()
        self.processor.image_processor.forget()

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds the template's choice and the system turn."""
        return {
            **super().describe(),
            "chat_template": "own" if self._template is not None else None,
            "system": self.system,
        }


class _PreparedOnce:
    """An image processor that remembers its last answers: the questions about an image ask for the same pixels."""

    KEPT = 4

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._answers: OrderedDict[Any, Any] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def forget(self) -> None:
        """Prepare anew from here on."""
        self._answers.clear()

    def __call__(self, images: Any, **options: Any) -> Any:
        flat = [one for own in images for one in own]
        key = (tuple(map(id, flat)), tuple(map(len, images)), repr(sorted(options.items(), key=lambda item: item[0])))
        if key not in self._answers:
            # The images are kept with the answer, so that nothing else can come to have their ids.
            self._answers[key] = (self._processor(images, **options), flat)
            if len(self._answers) > self.KEPT:
                self._answers.popitem(last=False)
        answer, _ = self._answers[key]
        return type(answer)(dict(answer))  # processors take entries out of it


@lru_cache(maxsize=16)
def decoded(image: ImageRef, preparation: ImagePreparation) -> Image.Image:
    """An image as RGB, prepared; the last few are kept, which all questions about an image ask for."""
    return preparation(open_reference(image)).convert("RGB")
