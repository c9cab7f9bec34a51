"""`medclip`: MedCLIP's checkpoints, its padded text features and its class prompts (Wang et al. 2022, EMNLP).

Facts from RyanWangZf/MedCLIP: modeling_medclip.py (towers, prompt classifier), dataset.py (preprocessing), prompts.py
(class prompts, tokenisation), constants.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PilImage
from PIL.Image import Image

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card, variant_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.class_prompts import PromptList
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts, Phrases
from medvlm_harness.model_backends.image_vectors import Vectors
from medvlm_harness.model_backends.open_clip_towers import read_checkpoint
from medvlm_harness.model_backends.resnet import is_resnet, resnet
from medvlm_harness.model_backends.towers import LENGTH_STEP, below, linear, parameter_count, refuse_key_mismatch
from medvlm_harness.model_backends.transformers_towers import bert_config, build_exactly, numbered

__all__ = ["MedClip", "MedClipBackend", "preprocess"]

SIZE = 224
MEAN, STD = 0.5862785803043838, 0.27950088968644304  # constants.py: of pixels in 0..1
MAX_TOKENS = 77  # prompts.py
LAYERS = (1, 2, -1)  # hidden states whose mean is the text's
LARGEST_LOG_SCALE = 4.6052  # compute_logits
WEIGHTS = ("pytorch_model.bin", "pytorch_model.safetensors")
VOCABULARY = "vocab.txt"
IMAGE, TEXT = "vision_model.", "text_model."
# Buffers that older transformers saved and newer ones compute.
COMPUTED = ("embeddings.position_ids", "attention.self.relative_position_index")


def preprocess(image: Image) -> torch.Tensor:
    """Pixels as MedCLIP's evaluation prepares them, shape (1, 224, 224).

    Grey, centred on a black square of its longer side (at least 224), bicubic to 224, normalised.
    """
    grey = image.convert("L")
    side = max(SIZE, *grey.size)
    square = PilImage.new("L", (side, side))
    square.paste(grey, (int((side - grey.width) / 2), int((side - grey.height) / 2)))
    small = square.resize((SIZE, SIZE), PilImage.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(small, dtype=np.float32)) / 255 - MEAN)[None] / STD


class MedClip(torch.nn.Module):
    """Both towers, their sizes read from the weights.

    Raises:
        UserError: if a key is missing or unexpected, or a shape differs.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], where: str) -> None:
        super().__init__()
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if not k.endswith(COMPUTED)}
        image, text = below(state, f"{IMAGE}model."), below(state, f"{TEXT}model.")
        self.is_resnet = is_resnet(image)
        heads = [f"{TEXT}projection_head.weight", *([] if self.is_resnet else [f"{IMAGE}projection_head.weight"])]
        marks = ["fc.weight"] if self.is_resnet else ["embeddings.patch_embeddings.projection.weight"]
        needed = [*heads, "logit_scale", *(f"{IMAGE}model.{name}" for name in marks)]
        needed += [f"{TEXT}model.embeddings.{name}_embeddings.weight" for name in ("word", "position")]
        towers = (f"{IMAGE}model.", f"{TEXT}model.")
        extra = [k for k in state if k not in needed and not k.startswith(towers)]
        refuse_key_mismatch(where, "MedCLIP", [k for k in needed if k not in state], extra, held=state)
        try:
            swin, bert = None if self.is_resnet else _swin_config(image), bert_config(text)
        except KeyError as error:  # a size stands in a weight that is not there
            raise UserError(f"{where} does not fit MedCLIP: it lacks {error.args[0]!r} of a tower.") from error
        from transformers import BertModel, SwinModel

        named = f"{where} ({IMAGE}model)"
        self.image = resnet(image, named, bias=False) if swin is None else build_exactly(SwinModel, swin, image, named)
        self.text = build_exactly(BertModel, bert, text, f"{where} ({TEXT}model)")
        self.image_head = None if self.is_resnet else linear(state[f"{IMAGE}projection_head.weight"])
        self.text_head = linear(state[f"{TEXT}projection_head.weight"])
        self.logit_scale = torch.nn.Parameter(state["logit_scale"])

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 1, 224, 224) -> (n, 512)."""
        pixels = pixels.expand(-1, 3, -1, -1)
        answer = self.image(pixels)
        features: torch.Tensor = answer if self.image_head is None else self.image_head(answer.pooler_output)
        return features

    def encode_ids(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(n, length) -> (n, 512): the mean over three hidden states and all positions, padding included.

        Args:
            input_ids: token ids.
            attention_mask: 1 for a token, 0 for padding, which no token attends to.
            lengths: how many positions of each text count, shape (n,); all by default. What a position holds does not
                depend on the padding behind it, so a text gets the same vector in every batch.
        """
        states = self.text(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        mean = torch.stack([states[k] for k in LAYERS]).mean(dim=0)
        if lengths is None:
            pooled = mean.mean(dim=1)
        else:
            counts = torch.arange(mean.shape[1], device=mean.device) < lengths[:, None]
            pooled = (mean * counts[..., None]).sum(dim=1) / lengths[:, None]
        features: torch.Tensor = self.text_head(pooled)
        return features


class MedClipBackend(DualEncoder):
    """MedCLIP with a Swin-T or a ResNet-50 image tower, told apart by the keys.

    `pretrained=` is the unpacked folder (medclip-vit, medclip-resnet) or its pytorch_model.bin. Texts need the
    vocabulary of Bio_ClinicalBERT: vocab.txt beside the weights, or `tokenizer=` a folder or file.

    A published text vector includes the padding of its list, so it depends on the other prompts. Here a label's phrases
    are padded to the longest of them, as published, and the store keeps a text once per padded length. Reports and
    other single texts are encoded without padding. No batch changes either.

    Published score of a class: the mean over its prompts of scale * cosine. A label's vector is therefore the mean of
    its prompts' unit vectors, not scaled to length 1 again, so that scale * margin is the published logit, wherever the
    class prompts are used (`prompts_file=`, `prompts=ours`): its softmax, whose largest is the published answer, for
    multiclass sets, its sigmoid for multilabel ones. With `prompts=task` the margin is the difference of two such
    means. The publication draws ten prompts per class at random; here all are taken.
    """

    card: ModelCard = backend_card("medclip")
    CARDS: ClassVar[Mapping[str, str]] = {"swin": "medclip", "resnet": "medclip-resnet"}  # by image tower
    PROMPT_LIST = PromptList(
        file="medclip/constants.py of github.com/RyanWangZf/MedCLIP (the lists are GLoRIA's, Apache-2.0)",
        assignment="CHEXPERT_CLASS_PROMPTS",
        ours="combinations",
    )
    FACTS: ClassVar[tuple[str, ...]] = (*DualEncoder.FACTS, "image_tower", "tower_parameters")
    image_tower: str | None = None
    tower_parameters: Mapping[str, int] | None = None  # projections included

    def __init__(self, *, tokenizer: str | None = None, lower_case: bool = True, **options: Any) -> None:
        if not isinstance(lower_case, bool):
            raise UserError(f"Expected lower_case to be True or False, but got {lower_case!r}.")
        self.tokenizer_option, self.lower_case = tokenizer, lower_case
        super().__init__(**options)
        if not self.checkpoint.settings:
            self.lacks = dict.fromkeys(("embed:text", "classify:image"), _NO_VOCABULARY)

    def locate(self) -> Checkpoint:
        """The weights, and the vocabulary where there is one."""
        path = Path(self.pretrained).expanduser()
        if path.is_dir():
            path = next((path / name for name in WEIGHTS if (path / name).is_file()), path)
        if not path.is_file():
            raise UserError(f"Expected pretrained to be MedCLIP's folder with {WEIGHTS[0]}, or that file, got {path}.")
        given = path.parent if self.tokenizer_option is None else Path(self.tokenizer_option).expanduser()
        vocabulary = given / VOCABULARY if given.is_dir() else given
        if self.tokenizer_option is not None and not vocabulary.is_file():
            raise UserError(f"Expected tokenizer to be a folder with {VOCABULARY}, or that file, but got {given}.")
        settings = (vocabulary,) if vocabulary.is_file() else ()
        return Checkpoint((path,), settings, {"lower_case": self.lower_case})

    def load(self) -> None:
        """Both towers in float32, whatever the file holds."""
        (file,) = self.checkpoint.weights
        self.towers = self.model = MedClip(read_checkpoint(file), str(file))
        self.logit_scale = float(self.towers.logit_scale.detach().clamp(0, LARGEST_LOG_SCALE).exp())
        self.image_tower = "resnet" if self.towers.is_resnet else "swin"
        text = parameter_count(self.towers.text) + parameter_count(self.towers.text_head)
        self.parameters = parameter_count(self.towers)
        self.tower_parameters = {"image": self.parameters - text - 1, "text": text}  # one is the scale
        rows = self.towers.text.config.vocab_size
        if self.checkpoint.settings and len(self.tokenizer) != rows:
            raise UserError(
                f"{self.checkpoint.settings[0]} has {len(self.tokenizer)} words, but the checkpoint {rows}: "
                "is it the vocabulary of Bio_ClinicalBERT?"
            )

    def preprocessing(self) -> dict[str, Any]:
        """What dataset.py, prompts.py and modeling_medclip.py fix."""
        return {"size": SIZE, "mean": MEAN, "std": STD, "max_tokens": MAX_TOKENS, "layers": list(LAYERS)}

    def preprocess(self, image: Image) -> torch.Tensor:
        """(1, 224, 224)."""
        return preprocess(image)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 1, 224, 224) -> (n, 512)."""
        return self.towers.encode_images(pixels)

    def encode_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(n, length) -> (n, 512), padding included in the mean, as published."""
        return self.towers.encode_ids(input_ids, attention_mask)

    @cached_property
    def tokenizer(self) -> Any:
        """BERT's, from the vocabulary alone."""
        from transformers import BertTokenizer

        if not self.checkpoint.settings:
            raise UserError(f"{self.card.name} cannot read texts: {_NO_VOCABULARY}.")
        return BertTokenizer(str(self.checkpoint.settings[0]), do_lower_case=self.lower_case)

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """In tokens, both ends included."""
        return [len(ids) for ids in self._token_ids(texts)]

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """Each text without padding."""
        return self._encode(texts)

    def _encode(self, texts: list[str], padded: int | None = None) -> EncodedTexts:
        """Texts padded to as many tokens; None: not padded."""
        rows = self._token_ids(texts)
        width = math.ceil((padded or max(map(len, rows))) / LENGTH_STEP) * LENGTH_STEP
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
            mask[k, : len(row)] = 1
        lengths = torch.tensor([padded or len(row) for row in rows], device=self.device)
        vectors = self.towers.encode_ids(ids.to(self.device), mask.to(self.device), lengths)
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        return EncodedTexts(vectors, [len(row) > MAX_TOKENS for row in whole])

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return rows

    def _means(self, phrases: Phrases) -> Vectors:
        """The mean of the unit vectors of each label's phrases, which are padded to the longest of them."""
        means = []
        for texts in phrases:
            longest = max(self.text_lengths(texts))
            encode = partial(self._encode, padded=longest)
            vectors = self._vectors_of(texts, encode, prompt=f"padded to {longest} tokens")
            means.append(np.mean([vectors[text].vector for text in texts], axis=0))
        return np.stack(means)

    def _complete_card(self) -> None:
        """Takes the card of the variant, once the keys have told which it is."""
        if self.image_tower is not None:
            self.card = variant_card(self.CARDS[self.image_tower], self.card)
        super()._complete_card()

    def describe(self) -> dict[str, Any]:
        """Adds the towers' sizes and the case of texts."""
        return {
            **super().describe(),
            "image_tower": self.image_tower,
            "tower_parameters": self.tower_parameters,
            "lower_case": self.lower_case,
        }


_NO_VOCABULARY = (
    f"it has no vocabulary: fetch {VOCABULARY} of emilyalsentzer/Bio_ClinicalBERT (Hugging Face) and put it beside the "
    "weights, or name its folder by tokenizer=DIR"
)


def _swin_config(state: Mapping[str, torch.Tensor]) -> Any:
    """Swin's configuration from the shapes of its weights, names without prefix."""
    from transformers import SwinConfig

    projection = state["embeddings.patch_embeddings.projection.weight"]
    blocks = [f"encoder.layers.{k}.blocks." for k in range(len(numbered(state, "encoder.layers.")))]
    tables = [state[f"{name}0.attention.self.relative_position_bias_table"] for name in blocks]
    hidden = state[f"{blocks[0]}0.intermediate.dense.weight"]
    return SwinConfig(
        image_size=SIZE,
        patch_size=projection.shape[-1],
        embed_dim=projection.shape[0],
        depths=[len(numbered(state, name)) for name in blocks],
        num_heads=[table.shape[1] for table in tables],
        window_size=(math.isqrt(tables[0].shape[0]) + 1) // 2,  # (2 * window - 1) squared relative positions
        mlp_ratio=hidden.shape[0] / hidden.shape[1],
    )
