"""`chexzero`: CheXzero's checkpoints with its preprocessing and its pair rule (Tiu et al. 2022, Nat. BME).

Facts from rajpurkarlab/CheXzero, MIT: zero_shot.py (pair rule, ensemble), data_process.py (preprocessing), train.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from PIL.Image import Image
from scipy.special import expit
from torch.nn.functional import interpolate

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts
from medvlm_harness.model_backends.image_vectors import Vectors, unit
from medvlm_harness.model_backends.open_clip_towers import load_exactly, read_checkpoint, wrap
from medvlm_harness.model_backends.towers import Towers, refuse_key_mismatch
from medvlm_harness.requests import LabelSet

__all__ = ["CheXzeroBackend", "build_model", "preprocess"]

CANVAS = 320  # data_process.py: images are stored at 320x320
MEAN, STD = 101.48761, 83.43944  # zero_shot.py: of pixels in 0..255


def preprocess(image: Image, size: int = 224) -> torch.Tensor:
    """Pixels as CheXzero prepares them, shape (3, size, size).

    Longest side to 320 (sizes truncated, Lanczos), centred on black, normalised in 0..255 without division by 255, then
    bicubic to `size` on the tensor without antialiasing, as torchvision 0.11 did.
    """
    grey = image.convert("L")
    ratio = CANVAS / max(grey.size)
    resized = grey.resize((int(grey.width * ratio), int(grey.height * ratio)), PilImage.Resampling.LANCZOS)
    canvas = PilImage.new("L", (CANVAS, CANVAS))
    canvas.paste(resized, ((CANVAS - resized.width) // 2, (CANVAS - resized.height) // 2))
    pixels = (torch.from_numpy(np.array(canvas, dtype=np.float32)) - MEAN) / STD
    small = interpolate(pixels[None, None], size=(size, size), mode="bicubic", align_corners=False, antialias=False)
    return small[0].expand(3, size, size)


def build_model(state: dict[str, torch.Tensor], where: str) -> Any:
    """An OpenAI-layout CLIP with QuickGELU, its sizes read from the weights.

    Raises:
        UserError: if a key is missing or unexpected, or a shape differs.
    """
    needed = ("visual.conv1.weight", "visual.positional_embedding", "text_projection", "token_embedding.weight")
    missing = [k for k in needed if k not in state]
    held = state if len(missing) == len(needed) else ()
    refuse_key_mismatch(where, "CheXzero (an OpenAI CLIP state dict)", missing, [], held=held)
    width, _, _, patch = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    text_width, embed_dim = state["text_projection"].shape
    vision_layers = sum(name.startswith("visual.") and name.endswith(".attn.in_proj_weight") for name in state)
    text_layers = sum(name.startswith("transformer.") and name.endswith(".attn.in_proj_weight") for name in state)
    model = open_clip.CLIP(
        embed_dim,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=vision_layers, width=width, patch_size=patch, image_size=patch * grid, head_width=64
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=state["positional_embedding"].shape[0],
            vocab_size=state["token_embedding.weight"].shape[0],
            width=text_width,
            heads=text_width // 64,
            layers=text_layers,
        ),
        quick_gelu=True,  # with GELU the weights load just as well, and every embedding is wrong
    )
    load_exactly(model, state, where, "CheXzero")
    return model


class CheXzeroBackend(DualEncoder):
    """One checkpoint, or a folder of them, ensembled as published: the mean of their probabilities.

    Of an ensemble, the margin is the logit of the mean probability; an embedding is the members' unit vectors one after
    the other, so that a cosine is the mean of the members' cosines.
    """

    card: ModelCard = backend_card("chexzero")

    def locate(self) -> Checkpoint:
        """One checkpoint, or every `*.pt` of a folder in the order of their names."""
        path = Path(self.pretrained).expanduser()
        files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"Expected pretrained to be a CheXzero checkpoint (.pt) or a folder of them, got {path}.")
        return Checkpoint(tuple(files))

    def load(self) -> None:
        """Load every member."""
        self.members: list[Towers] = []
        sizes = set()
        for file in self.checkpoint.weights:
            model = build_model(read_checkpoint(file), str(file))
            size = model.visual.image_size[0]
            sizes.add(size)
            tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
            self.members.append(wrap(model, tokenizer, preprocess=_Preprocess(size)))
        if len(sizes) > 1:
            raise UserError(
                f"Expected the checkpoints in {self.pretrained} to share one image size, but got {sorted(sizes)}."
            )
        models = [member.model for member in self.members]
        self.model = models[0] if len(models) == 1 else torch.nn.ModuleList(models)
        self.logit_scale = self.members[0].logit_scale  # not used by the published rule
        self.parameters = sum(member.parameters for member in self.members)

    def preprocessing(self) -> dict[str, Any]:
        """What zero_shot.py and data_process.py fix."""
        return {"canvas": CANVAS, "mean": MEAN, "std": STD}

    def preprocess(self, image: Image) -> torch.Tensor:
        """CheXzero's own, once for all members."""
        return self.members[0].preprocess(image)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, size, size) -> (n, members * d), of length 1 per member."""
        return torch.cat([_unit(member.encode_images(pixels)) for member in self.members], dim=1)

    def encode_image_maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """The patches of all members: (n, 3, size, size) -> (n, members * width, h, w)."""
        maps = [member.encode_image_maps for member in self.members]
        return torch.cat([encode(pixels) for encode in maps if encode is not None], dim=1)

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """(n, members * d); truncation is the same for all members."""
        encoded = [member.encode_texts(texts) for member in self.members]
        return EncodedTexts(torch.cat([_unit(e.vectors) for e in encoded], dim=1), encoded[0].truncated)

    @torch.no_grad()
    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The members' answers one after the other, each of any length."""
        self.ensure_loaded()
        pixels = pixels.to(self.device, self.dtype)
        return torch.cat([member.encode_images(pixels) for member in self.members], dim=1).float().cpu()

    def encode_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The members' answers one after the other, each of any length."""
        return torch.cat([member.encode_ids(input_ids, attention_mask) for member in self.members], dim=1)

    def _score(self, images: Vectors, label_set: LabelSet) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if len(self.checkpoint.weights) == 1 or label_set.kind == "multiclass":
            return super()._score(images, label_set)
        positive, negative = self._phrases(label_set)
        if negative is None:
            raise ValueError("a multilabel set has negative phrases")
        per_member = []
        for image, yes, no in zip(self._split(images), self._split(positive), self._split(negative), strict=True):
            margin = (image @ yes.T).astype(np.float64) - (image @ no.T).astype(np.float64)
            per_member.append(expit(margin))
        probability = np.mean(per_member, axis=0)
        return np.log(probability) - np.log1p(-probability), probability

    def _split(self, vectors: Vectors) -> list[Vectors]:
        return [unit(part) for part in np.split(vectors, len(self.checkpoint.weights), axis=1)]


class _Preprocess:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image) -> torch.Tensor:
        return preprocess(image, self.size)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return scaled
