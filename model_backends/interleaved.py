"""What LLaVA-Med and XrayGPT share: prompts whose pieces of text are tokenised one by one, with images in between.

Both stand on a LLaMA-type tokenizer of 32,000 pieces, which has no piece for an image. `<unk>` stands for each of an
image's features: no embedding is added, so the softmax stays as wide as it was trained.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from lm_eval.api.instance import Instance
from PIL.Image import Image

from medvlm_harness.data.images import open_reference
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.decoder import Decoding
from medvlm_harness.model_backends.sequences import Prompt
from medvlm_harness.model_backends.vision_language import IMAGE_PLACE, VisionLanguageBackend
from medvlm_harness.requests import Generation, ImageRef

__all__ = ["IMAGE_MARK", "InterleavedBackend"]

IMAGE_MARK = -200  # an image's place among token ids, as LLaVA's code writes it
IMAGE_TOKEN = 0  # <unk>
# transformers reads a tokenizer.model through both.
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


class InterleavedBackend(VisionLanguageBackend):
    """One turn of text and images, as the publication's own code writes it.

    Images stand where `<image>` says, without it before the text. For files without a tokenizer there are `logits` and
    `greedy` on token ids.
    """

    # --- for subclasses, beside `locate`, `config` and `read`

    IMAGE_BEFORE: ClassVar[str]  # an image before the text, where the text names no place for it
    STOPS: ClassVar[tuple[str, ...]] = ()  # what ends an answer beside the end token and a task's own stop strings

    @abstractmethod
    def conversation(self, turn: str) -> str:
        """The whole prompt of one turn, with `<image>` for each image, up to where the answer begins."""

    @property
    @abstractmethod
    def image_positions(self) -> int:
        """How many positions one image takes."""

    @abstractmethod
    def pixels(self, image: Image) -> torch.Tensor:
        """An image as the vision tower takes it, (3, height, width)."""

    def tidy(self, text: str) -> str:
        """An answer as the publication's code hands it out."""
        return text.strip()

    # --- tokens

    @cached_property
    def tokenizer(self) -> Any:
        """The files' tokenizer as they stand.

        transformers' classes for LLaMA drop a blank that a text begins with; the publications' code kept it.

        Raises:
            UserError: if a tokenizer.model cannot be read without a package that is missing.
        """
        from transformers import PreTrainedTokenizerFast

        folder = self.tokenizer_folder
        if not (folder / "tokenizer.json").is_file():
            if not (folder / "tokenizer.model").is_file():
                raise UserError(f"{folder} holds no tokenizer: expected tokenizer.model (or tokenizer.json) in it.")
            missing = [name for module, name in SENTENCEPIECE.items() if not _is_installed(module)]
            if missing:
                raise UserError(
                    f"{folder / 'tokenizer.model'} needs {' and '.join(missing)}, not installed here: "
                    "pip install 'medvlm-harness[sentencepiece]'"
                )
        # The names are LLaMA's; the folders of early conversions leave them empty. <unk> must not fill up a batch: it
        # is what stands for images.
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        with self._one_line("tokenizer"):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **names)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files lie."""
        return self.folder

    @cached_property
    def max_length(self) -> int:
        """The longest input in tokens: asked for, else the language model's positions."""
        return self.max_length_asked or int(self.config.text_config.max_position_embeddings)

    def prompt_text(self, text: str, images: int) -> str:
        """The whole prompt of one turn, with `<image>` for each image.

        Raises:
            UserError: if the text names places for another number of images.
        """
        places = text.count(IMAGE_PLACE)
        if places not in (0, images):
            raise UserError(f"A prompt names {places} places for images ({IMAGE_PLACE}), but {images} came with it.")
        return self.conversation(text.strip() if places else self.IMAGE_BEFORE * images + text.strip())

    def encode_turn(self, text: str, images: Sequence[ImageRef]) -> Prompt:
        """One turn as tokens: each piece of text by itself, BOS before the first."""
        pieces = self.prompt_text(text, len(images)).split(IMAGE_PLACE)
        ids = [self.tokenizer.bos_token_id]
        end = 0
        for number, piece in enumerate(pieces):
            if number:
                ids += [IMAGE_TOKEN] * self.image_positions
                end = len(ids)
            added = self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            if images and IMAGE_TOKEN in added:
                raise UserError(f"A prompt with images has <unk> in its text, which stands for images here: {piece!r}.")
            ids += added
        return Prompt(tuple(ids), images=tuple(images), image_end=end)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The tokens of an answer by itself."""
        ids = super().answer_ids(answer)
        if IMAGE_TOKEN in ids:
            raise UserError(f"An answer has <unk> in its text, which stands for images here: {answer!r}.")
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Not from outside: every turn is put into the publication's conversation."""
        raise UserError(f"{self.card.name} has a conversation of its own: leave out --apply_chat_template.")

    def stack(self, prompts: Sequence[Prompt], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The pixels of all images of a batch, in order."""
        refs = [ref for prompt in prompts for ref in prompt.images]
        if not refs:
            return {}
        decoded = {ref: self.pixels(self.preparation(open_reference(ref))) for ref in dict.fromkeys(refs)}
        return {"pixel_values": torch.stack([decoded[ref] for ref in refs]).to(self.device, self.dtype)}

    def _generations(self, requests: Sequence[Instance], decoding: Decoding) -> list[Generation]:
        until = tuple(dict.fromkeys((*decoding.until, *self.STOPS)))
        texts = super()._generations(requests, decoding._replace(until=until))
        return [Generation(self.tidy(text), text.finished) for text in texts]

    # --- on token ids, without a tokenizer

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """What the model says after each position.

        Args:
            ids: token ids with `IMAGE_MARK` at the place of each image, (n, tokens).
            pixels: the images in their order, (images, 3, height, width).

        Returns:
            Float32, (n, tokens with features for images, vocabulary).
        """
        output = self._network(**self._inputs(ids, pixels))
        result: torch.Tensor = output.logits.float().cpu()
        return result

    @torch.inference_mode()
    def greedy(self, ids: torch.Tensor, pixels: torch.Tensor, tokens: int) -> torch.Tensor:
        """The tokens that follow by greedy decoding, (n, `tokens`); arguments as of `logits`."""
        inputs = self._inputs(ids, pixels)
        found: torch.Tensor = self._network.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return found[:, inputs["input_ids"].shape[1] :].cpu()

    @property
    def _network(self) -> Any:
        self.ensure_loaded()
        return self.model

    def _inputs(self, ids: torch.Tensor, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        image = [IMAGE_TOKEN] * self.image_positions
        rows = [[token for one in row for token in (image if one == IMAGE_MARK else [one])] for row in ids.tolist()]
        return {
            "input_ids": torch.tensor(rows, device=self.device),
            "pixel_values": pixels.to(self.device, self.dtype),
        }


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False
