"""`medfilip`: checkpoints of MedFILIP's training code, with its description prompts (Liang et al. 2025).

Facts from PerceptionComputingLab/MedFILIP, Apache-2.0: train/models.py (towers), train/train.py (preprocessing,
checkpoint, prompts), train/constants.py (descriptions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import open_clip
import torch
from PIL.Image import Image
from torch.nn.functional import interpolate

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card, variant_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.class_prompts import PromptList
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts
from medvlm_harness.model_backends.open_clip_towers import load_exactly, read_checkpoint, truncated
from medvlm_harness.model_backends.resnet import is_resnet, resnet
from medvlm_harness.model_backends.towers import LENGTH_STEP, below, linear, parameter_count, refuse_key_mismatch
from medvlm_harness.model_backends.transformers_towers import build_exactly, numbered

__all__ = ["MedFilip", "MedFilipBackend", "preprocess"]

SIZE = 448
EVA = "eva02_base_patch14_448"
IMAGE, TEXT = "image_model.", "text_model."
COMPUTED = (f"{TEXT}embeddings.position_ids",)  # a buffer that older transformers saved
END = 49407  # CLIP's end token, which is its padding too


def preprocess(image: Image, mean: float, std: float) -> torch.Tensor:
    """Pixels as MedFILIP's training prepares them, shape (3, 448, 448): grey, squeezed to the square, normalised.

    Args:
        image: of any size; its aspect ratio is not kept.
        mean: of pixels in 0..1.
        std: likewise.
    """
    pixels = torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)) / 255
    small = interpolate(pixels[None, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    return ((small[0] - mean) / std).expand(3, SIZE, SIZE)


class MedFilip(torch.nn.Module):
    """Both towers, their sizes read from the weights.

    Raises:
        UserError: if a key is missing or unexpected, or a shape differs.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], where: str) -> None:
        super().__init__()
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if k not in COMPUTED}
        image, text = below(state, IMAGE), below(state, TEXT)
        self.is_resnet = is_resnet(image)
        own = ("text_projection.weight", "logit_scale")
        first = "fc.weight" if self.is_resnet else "patch_embed.proj.weight"
        needed = [
            *own,
            f"{IMAGE}{first}",
            *(f"{TEXT}embeddings.{part}_embedding.weight" for part in ("token", "position")),
        ]
        extra = [k for k in state if k not in own and not k.startswith((IMAGE, TEXT))]
        refuse_key_mismatch(where, "MedFILIP", [k for k in needed if k not in state], extra, held=state)
        try:
            settings = _clip_text_config(text)
            named = f"{where} ({IMAGE[:-1]})"
            self.image = resnet(image, named, bias=True) if self.is_resnet else _eva(image, named)
        except KeyError as error:  # a size stands in a weight that is not there
            raise UserError(f"{where} does not fit MedFILIP: it lacks {error.args[0]!r} of a tower.") from error
        from transformers import CLIPTextModel

        # Its own checkpoints have this prefix too.
        prefixed = {f"{TEXT}{name}": tensor for name, tensor in text.items()}
        self.text = build_exactly(CLIPTextModel, settings, prefixed, where)
        self.text_projection = linear(state["text_projection.weight"])
        self.logit_scale = torch.nn.Parameter(state["logit_scale"])

    def encode_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(n, length) -> (n, 768), from the first end token; no token sees those behind it."""
        pooled = self.text(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        features: torch.Tensor = self.text_projection(pooled)
        return features


class MedFilipBackend(DualEncoder):
    """MedFILIP with a ResNet-50 or an EVA-02 image tower, told apart by the keys.

    `pretrained=` is a file of its training code (state dict under `network`) or a bare state dict. Nobody published
    one. `mean=` and `std=` are those of the training images (pixels in 0..1), which the training code computes when it
    begins, prints, and stores nowhere.

    With `prompts_file=` or `prompts=ours` a class is asked as "{disease}. {description}". The publication ranks by
    scale * cosine with that text, the largest of many thresholds taken, and was trained with a sigmoid on it. The
    published code fails on texts of more than 77 tokens; here they are cut, and counted.
    """

    card: ModelCard = backend_card("medfilip")
    CARDS: ClassVar[Mapping[str, str]] = {"resnet": "medfilip", "eva02": "medfilip-eva02"}  # by image tower
    PROMPT_LIST = PromptList(
        file="train/constants.py of github.com/PerceptionComputingLab/MedFILIP (Apache-2.0)",
        assignment="description_book",
        ours="descriptions",
        names={"pleural effusion": "effusion", "lung opacity": "opacity", "lung lesion": "lesion"},
    )
    FACTS: ClassVar[tuple[str, ...]] = (*DualEncoder.FACTS, "image_tower", "tower_parameters")
    image_tower: str | None = None
    tower_parameters: Mapping[str, int] | None = None  # projections included

    def __init__(self, *, mean: float | None = None, std: float | None = None, **options: Any) -> None:
        if not _is_number(mean) or not _is_number(std) or float(std or 0) <= 0:
            raise UserError(
                "medfilip needs mean=NUMBER,std=NUMBER, of the pixels (0..1) of the images that the checkpoint was "
                f"trained on: none were published, its training code prints them. Got mean={mean!r}, std={std!r}."
            )
        self.mean, self.std = float(mean or 0), float(std or 0)
        super().__init__(**options)

    def locate(self) -> Checkpoint:
        """The file."""
        path = Path(self.pretrained).expanduser()
        if not path.is_file():
            raise UserError(f"Expected pretrained to be a file that MedFILIP's training code wrote (.pt), got {path}.")
        return Checkpoint((path,))

    def load(self) -> None:
        """Both towers in float32."""
        (file,) = self.checkpoint.weights
        self.towers = self.model = MedFilip(read_checkpoint(file), str(file))
        self.logit_scale = float(self.towers.logit_scale.detach().exp())
        self.image_tower = "resnet" if self.towers.is_resnet else "eva02"
        image = parameter_count(self.towers.image)
        self.parameters = parameter_count(self.towers)
        self.tower_parameters = {"image": image, "text": self.parameters - image - 1}  # one is the scale
        length = self.towers.text.config.max_position_embeddings
        self.tokenizer = open_clip.SimpleTokenizer(context_length=length)

    def preprocessing(self) -> dict[str, Any]:
        """The size of train.py, and the constants given."""
        return {"size": SIZE, "mean": self.mean, "std": self.std}

    def preprocess(self, image: Image) -> torch.Tensor:
        """(3, 448, 448)."""
        return preprocess(image, self.mean, self.std)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, 448, 448) -> (n, 768)."""
        features: torch.Tensor = self.towers.image(pixels)
        return features

    def encode_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(n, length) -> (n, 768)."""
        return self.towers.encode_ids(input_ids, attention_mask)

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """In tokens, both ends included."""
        lengths: list[int] = (self.tokenizer(list(texts)) != 0).sum(dim=1).tolist() if texts else []
        return lengths

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """With CLIP's tokenizer, as far as the longest text reaches."""
        ids = self.tokenizer(texts)
        width = math.ceil(int((ids != 0).sum(dim=1).max()) / LENGTH_STEP) * LENGTH_STEP
        vectors = self.towers.encode_ids(ids[:, :width].to(self.device))
        return EncodedTexts(vectors, truncated(self.tokenizer, texts, ids))

    def _complete_card(self) -> None:
        """Takes the card of the variant, once the keys have told which it is."""
        if self.image_tower is not None:
            self.card = variant_card(self.CARDS[self.image_tower], self.card)
        super()._complete_card()

    def describe(self) -> dict[str, Any]:
        """Adds the towers' sizes and the constants given."""
        return {
            **super().describe(),
            "image_tower": self.image_tower,
            "tower_parameters": self.tower_parameters,
            "normalisation": {"mean": self.mean, "std": self.std},
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _clip_text_config(state: Mapping[str, torch.Tensor]) -> Any:
    """The configuration of CLIP's text tower from the shapes of its weights, names without prefix."""
    from transformers import CLIPTextConfig

    vocabulary, width = state["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(numbered(state, "encoder.layers.")),
        num_attention_heads=max(1, width // 64),  # CLIP's heads are 64 wide at every published size
        max_position_embeddings=state["embeddings.position_embedding.weight"].shape[0],
        hidden_act="quick_gelu",
        pad_token_id=END,
        bos_token_id=END - 1,
        eos_token_id=END,
    )


def _eva(state: Mapping[str, torch.Tensor], where: str) -> torch.nn.Module:
    """Timm's EVA-02 without a classifier, at the size of the weights."""
    import timm

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    tokens = state["pos_embed"].shape[1] - 1
    model: torch.nn.Module = timm.create_model(
        EVA,
        pretrained=False,
        num_classes=0,
        img_size=patch * math.isqrt(tokens),
        embed_dim=width,
        depth=len(numbered(state, "blocks.")),
        num_heads=max(1, width // 64),
        mlp_ratio=state["blocks.0.mlp.fc1_g.weight"].shape[0] / width,
    )
    load_exactly(model, dict(state), where, f"timm's {EVA}")
    return model
