"""`xraygpt`: XrayGPT from the files that its code reads, through transformers' BLIP-2 (Thawakar et al. 2024, BioNLP).

Facts from mbzuai-oryx/XrayGPT: models/mini_gpt4.py (parts and loading order), models/eva_vit.py, models/blip2.py,
conversation/conversation.py (prompt and what is cut off an answer). Its README speaks of MedCLIP's image encoder; its
code has EVA-CLIP ViT-g/14 and BLIP-2's Q-Former, which is what its checkpoints fit.

What its code does at random (a prompt drawn from prompts/alignment.txt, sampled answers) is fixed here: the prompt of
its demo, and greedy decoding unless a task samples.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image as PilImage
from PIL.Image import Image
from transformers import Blip2ForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.interleaved import InterleavedBackend
from medvlm_harness.model_backends.xraygpt_files import XrayGptFiles, published_state

__all__ = ["ImageStages", "XrayGptBackend", "preprocess"]

# conversation/conversation.py, CONV_VISION, with one question asked.
CONVERSATION = (
    "You are an experienced Doctor, give the following medical scan: <Img>ImageContent</Img>. "
    "You will be able to see the medical scan once I provide it to you. Please answer my questions."
    "###Patient: {q}###Doctor:"
)
STOP, SPEAKER = "###", "Doctor:"
LN_VISION_EPS = 1e-5  # torch's default, which blip2.py leaves; BLIP-2 in transformers has 1e-6 for all of the tower


class ImageStages(NamedTuple):
    """An image on its way into the language model."""

    vision: torch.Tensor  # after ln_vision, (n, positions, width)
    queries: torch.Tensor  # after the Q-Former, (n, queries, width)
    projected: torch.Tensor  # (n, queries, width of the language model)


def preprocess(image: Image, side: int = 224) -> torch.Tensor:
    """Pixels as XrayGPT prepares them, (3, side, side): bicubic to a square whatever the shape, CLIP's mean and std."""
    resized = image.convert("RGB").resize((side, side), PilImage.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32) / 255).permute(2, 0, 1)
    mean, std = torch.tensor(OPENAI_CLIP_MEAN)[:, None, None], torch.tensor(OPENAI_CLIP_STD)[:, None, None]
    return (pixels - mean) / std


class _Network(Blip2ForConditionalGeneration):  # type: ignore[misc]  # transformers carries no types
    """BLIP-2 with XrayGPT's epsilon, and with what its language model takes and gives: positions, cache, text alone."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_model.post_layernorm.eps = LN_VISION_EPS

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> Any:
        """The language model's own output."""
        return self.language_model(
            inputs_embeds=self._embedded(input_ids, pixel_values),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            logits_to_keep=logits_to_keep,
            **options,
        )

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **options: Any) -> Any:
        """Prompts and what follows them, (n, tokens)."""
        embedded = self._embedded(input_ids, pixel_values)
        return self.language_model.generate(input_ids=input_ids, inputs_embeds=embedded, **options)

    def _embedded(self, ids: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
        embedded: torch.Tensor = self.get_input_embeddings()(ids)
        if pixels is None:
            return embedded
        features = self.get_image_features(pixels).pooler_output.to(embedded)
        places = self.get_placeholder_mask(ids, inputs_embeds=embedded).expand_as(embedded)
        if int(places.sum()) != features.numel():
            raise ValueError(f"{features.shape[:2].numel()} features of images, but {int(places[..., 0].sum())} places")
        return embedded.masked_scatter(places, features)


class XrayGptBackend(InterleavedBackend):
    """XrayGPT: EVA-CLIP ViT-g/14 at 224 pixels, BLIP-2's Q-Former with 32 queries, one linear layer, Vicuna-7B.

    `pretrained=` is a folder with the published files (`eva=`, `blip2=`, `vicuna=`, `minigpt4=` and `checkpoint=` say
    where one lies elsewhere), or one file with all weights under `model` and its sizes beside it in NAME_config.json.
    """

    card: ModelCard = backend_card("xraygpt")
    IMAGE_BEFORE: ClassVar[str] = "<image> "
    STOPS: ClassVar[tuple[str, ...]] = (STOP,)

    def __init__(
        self,
        *,
        eva: str | None = None,
        blip2: str | None = None,
        vicuna: str | None = None,
        minigpt4: str | None = None,
        checkpoint: str | None = None,
        **options: Any,
    ) -> None:
        if options.get("gguf_file") is not None or options.get("model_revision") is not None:
            raise UserError("xraygpt loads the files that its code reads: no GGUF file, and nothing from the Hub.")
        self._elsewhere = {"eva": eva, "blip2": blip2, "vicuna": vicuna, "minigpt4": minigpt4, "checkpoint": checkpoint}
        super().__init__(**options)

    # --- files

    def locate(self) -> Checkpoint:
        """The published set, or one file with everything."""
        self.files = XrayGptFiles.find(Path(self.pretrained).expanduser(), self._elsewhere)
        self.folder = self.files.language
        return Checkpoint(self.files.weights, self.files.settings, {"sizes": self.config.to_diff_dict()})

    @cached_property
    def config(self) -> Any:
        """Transformers' configuration of BLIP-2: the published sizes, Vicuna's from its own config.json."""
        with self._one_line("configuration"):
            return self.files.config()

    def _stored_dtype(self) -> torch.dtype | None:
        """The language model's, by far the largest part."""
        return self.files.stored_dtype()

    # --- loading

    def model_class(self) -> Any:
        """Transformers' BLIP-2."""
        return _Network

    def read(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """All files in the order of the publication's code: of weights that are in two, the later counts."""
        del options["local_files_only"], options["trust_remote_code"]  # of a place, and there is none
        state = published_state(self.files, self.config)
        model, info = _Network.from_pretrained(None, config=self.config, state_dict=state, **options)
        return model, info

    def check_keys(self, target: str, missing: set[str], unexpected: set[str]) -> None:
        """Names the file that a missing weight should have come from."""
        super().check_keys(f"XrayGPT{self.files.expected_in(missing)}", missing, unexpected)

    # --- images and prompts

    @property
    def image_positions(self) -> int:
        """32 of the published model: one per query."""
        return int(self.config.num_query_tokens)

    def pixels(self, image: Image) -> torch.Tensor:
        """As published."""
        return preprocess(image, self.config.vision_config.image_size)

    def conversation(self, turn: str) -> str:
        """The demo's, with one question."""
        return CONVERSATION.format(q=turn.replace("<image>", "<Img><image></Img>"))

    @torch.inference_mode()
    def image_stages(self, pixels: torch.Tensor) -> ImageStages:
        """What each part makes of images, in float32."""
        found = self._network.get_image_features(pixels.to(self.device, self.dtype))
        stages = (found.last_hidden_state, found.qformer_outputs.last_hidden_state, found.pooler_output)
        return ImageStages(*(stage.float().cpu() for stage in stages))

    def tidy(self, text: str) -> str:
        """What stands after the speaker's name, which the model may write itself."""
        return text.rpartition(SPEAKER)[2].strip()
