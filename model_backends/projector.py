"""`medvlm-projector`: a frozen image tower, projected into the words of a frozen causal language model.

What `medvlm finetune --method projector` trains. The design is LLaVA's (Liu et al. 2023, arXiv 2304.08485; two layers:
arXiv 2310.03744), with both sides frozen and a bias of its own for each place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import CARD_FILE, ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.checkpoints import Checkpoint
from medvlm_harness.model_backends.dual_encoder import DualEncoder
from medvlm_harness.model_backends.frozen_encoder import recorded_encoder
from medvlm_harness.model_backends.identity import check_weights
from medvlm_harness.model_backends.image_preparation import AS_PUBLISHED
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.sequences import Prompt
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.model_backends.towers import refuse_key_mismatch
from medvlm_harness.model_backends.vision_language import VisionLanguageBackend, turn_parts
from medvlm_harness.requests import ImageRef

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "ProjectedLanguageModel",
    "Projector",
    "ProjectorBackend",
    "causal_class",
    "image_places",
    "turn_ids",
]

WEIGHTS_FILE, CONFIG_FILE = "projector.safetensors", "projector.json"
# A bias is one number where a layer sums a thousand: at one learning rate it would move too slowly.
PLACE_GAIN = 10.0
_CONFIG_KEYS = frozenset({"grid", "hidden", "instruction", "images", "encoder", "language_model"})


class Projector(nn.Module):
    """Places of an image as embeddings of a language model: standardised, two linear layers, a bias per place.

    Args:
        channels: of the image tower's map.
        hidden: units between the layers.
        width: of the language model's embeddings.
        places: per image.
    """

    mean: torch.Tensor
    spread: torch.Tensor
    size: torch.Tensor

    def __init__(self, channels: int, hidden: int, width: int, places: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, hidden)
        self.second = nn.Linear(hidden, width)
        self.place = nn.Parameter(torch.zeros(places, width))
        self.register_buffer("mean", torch.zeros(channels))  # of the features of training images
        self.register_buffer("spread", torch.ones(channels))
        self.register_buffer("size", torch.ones(()))  # root mean square of the language model's own embeddings

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(images, places, channels) -> (images, places, width), float32."""
        standard = (features.float() - self.mean) / self.spread
        mapped: torch.Tensor = self.second(functional.gelu(self.first(standard))) + PLACE_GAIN * self.place
        return mapped * self.size


class Output(NamedTuple):
    """Of transformers' outputs, what generation and scoring read."""

    logits: torch.Tensor
    past_key_values: Any


class ProjectedLanguageModel(nn.Module):
    """A causal language model whose prompts have places for images; transformers' generative interface.

    The token after its vocabulary marks such a place: no text gives it.
    """

    def __init__(self, language_model: Any, projector: Projector) -> None:
        super().__init__()
        self.language_model, self.projector = language_model, projector
        self.place_id = place_id(language_model)
        self._accepted = frozenset(signature(language_model.forward).parameters)
        self._cache_name = "cache" if "cache" in self._accepted else "past_key_values"  # by release of transformers

    @property
    def generation_config(self) -> Any:
        """The language model's."""
        return self.language_model.generation_config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: torch.Tensor | None = None,
    ) -> Output:
        """As the language model's own.

        Args:
            input_ids: (n, length).
            attention_mask: as transformers takes it.
            position_ids: likewise.
            past_key_values: likewise.
            use_cache: likewise.
            logits_to_keep: how many of the last, where the language model can leave others out; 0 is all.
            image_features: of the batch's images in the order of their places, (images, places, channels).
        """
        options = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            self._cache_name: past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        known = {name: value for name, value in options.items() if name in self._accepted}
        output = self.language_model(inputs_embeds=self.embedded(input_ids, image_features), **known)
        return Output(output.logits, getattr(output, self._cache_name))

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_features: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As the language model's own: the prompt's tokens (0 at the places of images) and what follows."""
        embeddings = self.embedded(input_ids, image_features)
        plain = input_ids.masked_fill(input_ids == self.place_id, 0)
        generated: torch.Tensor = self.language_model.generate(
            input_ids=plain, inputs_embeds=embeddings, attention_mask=attention_mask, **options
        )
        return generated

    def embedded(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of tokens, and of images in their places, (n, length, width).

        Raises:
            ValueError: if there are more or fewer images than places for them.
        """
        places = input_ids == self.place_id
        embeddings: torch.Tensor = self.language_model.get_input_embeddings()(input_ids.masked_fill(places, 0))
        needed = int(places.sum())
        given = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if needed != given:
            raise ValueError(f"Expected features for {needed} places, but got {given}.")
        if image_features is None:
            return embeddings
        projected = self.projector(image_features).to(embeddings.dtype)
        return embeddings.masked_scatter(places[..., None], projected)


class ProjectorBackend(VisionLanguageBackend):
    """A folder that `medvlm finetune --method projector` wrote.

    The encoder and the language model are found where they lay; `encoder_pretrained=` and `language_model=` say where
    they lie now. Either is refused if its weights are not those that the projector was trained on.
    """

    card: ModelCard = backend_card("medvlm-projector")

    def __init__(
        self, *, encoder_pretrained: str | None = None, language_model: str | None = None, **options: Any
    ) -> None:
        self._encoder_pretrained, self._language_model = encoder_pretrained, language_model
        super().__init__(**options)

    # --- files

    def locate(self) -> Checkpoint:
        """The projector, the language model's files, and the encoder as a backend of its own."""
        self.home = Path(self.pretrained).expanduser()
        missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE) if not (self.home / name).is_file()]
        if missing:
            raise UserError(
                f"Expected pretrained to be a folder that `medvlm finetune --method projector` wrote, but {self.home} "
                f"has no {' and no '.join(missing)}."
            )
        self.recipe = read_recipe(self.home / CONFIG_FILE)
        self.encoder: DualEncoder = recorded_encoder(
            self.recipe["encoder"], pretrained=self._encoder_pretrained, device=str(self._device)
        )
        if self.preparation == AS_PUBLISHED:  # as in training
            self.preparation = self.encoder.preparation
        self.encoder.preparation = self.preparation
        self.encoder.meter = self.meter
        self.pretrained = str(self._language_model or self.recipe["language_model"]["pretrained"])
        language = super().locate()
        self.card = replace(self.card, name=self.home.name, source=None)  # above, they are the language model's
        return Checkpoint((self.home / WEIGHTS_FILE, *language.weights), language.settings)

    def parts(self) -> list[TorchBackend]:
        """Adds the encoder."""
        return [self, self.encoder]

    def model_class(self) -> Any:
        """The language model's, which must be causal."""
        return causal_class(self.config, self.pretrained)

    def begin(self, background: Executor) -> None:
        """Hash the weights of all three."""
        super().begin(background)
        self.encoder.begin(background)

    @cached_property
    def weights(self) -> dict[str, str]:
        """Hashes of the projector, the language model and the encoder.

        Raises:
            UserError: if a base model is not the one that the projector was trained on.
        """
        own = super().weights
        language = {name: value for name, value in own.items() if name != WEIGHTS_FILE}
        encoder = self.encoder.weights
        check_weights(
            f"The language model {self.pretrained}",
            self.recipe["language_model"]["weights"],
            language,
            option="language_model",
        )
        check_weights(
            f"The encoder {self.encoder.pretrained}",
            self.recipe["encoder"]["weights"],
            encoder,
            option="encoder_pretrained",
        )
        return {**own, **{f"encoder/{name}": value for name, value in encoder.items()}}

    def preprocessing(self) -> dict[str, Any]:
        """Adds the grid and all that decides the encoder's maps."""
        return {**super().preprocessing(), "grid": self.grid, "encoder": self.encoder.identity}

    @property
    def grid(self) -> int:
        """Places of an image along each side."""
        return int(self.recipe["grid"])

    # --- the model

    def load(self) -> None:
        """The language model, then the projector; the encoder loads with its first image."""
        if not self.weights:
            raise UserError(f"The weights of {self.pretrained} cannot be told.")
        super().load()
        language_model: Any = self.model
        self.encoder.ensure_loaded()
        state = _read_state(self.home / WEIGHTS_FILE)
        width = language_model.get_input_embeddings().embedding_dim
        channels = state["mean"].numel() if "mean" in state else 0
        projector = Projector(channels, int(self.recipe["hidden"]), width, self.grid**2)
        expected = projector.state_dict()
        where = str(self.home / WEIGHTS_FILE)
        refuse_key_mismatch(where, CONFIG_FILE, expected.keys() - state.keys(), state.keys() - expected.keys())
        for name, tensor in state.items():
            if tensor.shape != expected[name].shape:
                raise UserError(
                    f"{where} does not fit {CONFIG_FILE}: {name} is {tuple(tensor.shape)}, expected "
                    f"{tuple(expected[name].shape)}."
                )
        projector.load_state_dict(state)
        trained = sum(parameter.numel() for parameter in projector.parameters())
        self.parameters = (self.parameters or 0) + trained + (self.encoder.parameters or 0)
        self.transform = self.encoder.transform or self.encoder.card.preprocessing
        self.model = ProjectedLanguageModel(language_model, projector.to(self._device))

    def encode_turn(self, text: str, images: Sequence[ImageRef]) -> Prompt:
        """As in training: no chat template, images before the text unless it says where."""
        ids = turn_ids(self.tokenizer, text, len(images), places=self.grid**2, place=self._place)
        last = max((k for k, token in enumerate(ids) if token == self._place), default=-1)
        return Prompt(ids, images=tuple(images), image_end=last + 1)

    def stack(self, prompts: Sequence[Prompt], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The encoder's maps of all images, at the grid's places."""
        refs = [ref for prompt in prompts for ref in prompt.images]
        if not refs:
            return {}
        found = image_places(self.encoder, refs, grid=self.grid)
        return {"image_features": torch.stack([found[ref] for ref in refs]).to(self._device)}

    @cached_property
    def _place(self) -> int:
        self.ensure_loaded()
        network: Any = self.model
        return int(network.place_id)

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds the parts and how they were put together."""
        described = super().describe()
        return {
            **described,
            "encoder": {"card": self.encoder.card.to_dict(), "weights_sha256": self.encoder.weights_sha256},
            "image_tokens": self.grid**2,
            "trained_with_instruction": self.recipe["instruction"],
        }


def place_id(language_model: Any) -> int:
    """The token that marks a place for an image: the one after the vocabulary."""
    return int(language_model.get_input_embeddings().num_embeddings)


def turn_ids(tokenizer: Any, text: str, images: int, *, places: int, place: int) -> tuple[int, ...]:
    """A turn as tokens, with `places` marks for each image; training and evaluation share it.

    Args:
        tokenizer: the language model's.
        text: with `<image>` where the images are, or without: then they come first.
        images: how many.
        places: tokens of an image.
        place: the token that marks one.

    Raises:
        UserError: if nothing is left to begin with.
    """
    begin = tokenizer("", verbose=False)["input_ids"][:1]
    ids = list(begin if begin == [tokenizer.bos_token_id] else [])
    for part in turn_parts(text, images):
        ids += (
            [place] * places if part is None else tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        )
    if not ids:
        raise UserError("A prompt has no tokens: this model cannot start from nothing.")
    return tuple(ids)


def image_places(encoder: DualEncoder, images: Sequence[ImageRef], *, grid: int) -> dict[ImageRef, torch.Tensor]:
    """Features of each distinct image at the places of a grid, row by row, (grid * grid, channels), on the CPU.

    The encoder's map is averaged over the grid's cells; of an encoder without one, all places hold its vector.
    """
    found: dict[ImageRef, torch.Tensor] = {}
    for refs, maps in encoder.image_maps(list(dict.fromkeys(images))):
        pooled = functional.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2).contiguous()
        found.update(zip(refs, pooled, strict=True))
    return found


def causal_class(config: Any, where: str) -> Any:
    """The class of transformers for a causal language model's configuration.

    Raises:
        UserError: if it is of no causal model.
    """
    from transformers import AutoModelForCausalLM

    if LanguageModelBackend.class_of(config, where) is not AutoModelForCausalLM:
        raise UserError(f"Expected a causal language model, but {where} is an encoder-decoder ({config.model_type}).")
    return AutoModelForCausalLM


def read_recipe(path: Path) -> Mapping[str, Any]:
    """The settings of a trained projector.

    Raises:
        UserError: if they are not what `medvlm finetune` writes.
    """
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(recipe, dict) or recipe.keys() != _CONFIG_KEYS:
        raise UserError(f"{path}: expected the keys {', '.join(sorted(_CONFIG_KEYS))}, and no others.")
    return recipe


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as weights: {error}") from error
