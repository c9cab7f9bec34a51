"""The tokens of a dual encoder's image tower, with the layers that they go through one by one.

A transformer tower is split into what comes before its layers, the layers, and the norm behind them, so that further
tokens can go through some of its layers. Towers without such layers (CNNs; Swin, whose attention stays inside windows;
ensembles) give the places of `encode_image_maps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from medvlm_harness.model_backends.dual_encoder import DualEncoder

__all__ = ["Step", "TokenTower", "token_tower"]

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TokenTower:
    """An image tower as a sequence of token layers; it holds the model's own modules, no copies."""

    embed: Step  # (n, channels, height, width) -> (n, tokens, d), the input of the first layer
    layers: Sequence[Step] = ()  # (n, tokens, d) -> (n, tokens, d); none: `embed` is the whole tower
    norm: Step | None = None  # behind the last layer
    prefix: int = 0  # tokens before those of the patches: class token, registers

    def run(self, tokens: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens (n, tokens, d) through the layers from `start` up to `stop`; the norm follows the last one."""
        stop = len(self.layers) if stop is None else stop
        for layer in self.layers[start:stop]:
            tokens = layer(tokens)
        return tokens if self.norm is None or stop < len(self.layers) else self.norm(tokens)


def token_tower(encoder: DualEncoder) -> TokenTower:
    """The image tower of a loaded dual encoder.

    With layers: open_clip's own ViT, timm's ViT in it, and CLIP- and SigLIP-like models of transformers.
    """
    model: Any = encoder.model
    if isinstance(model, nn.ModuleList) and len(model) == 1:
        model = model[0]
    visual, vision = getattr(model, "visual", None), getattr(model, "vision_model", None)
    trunk = getattr(visual, "trunk", None)
    tower = _timm_vit(trunk) or _open_clip_vit(visual) or _transformers_vit(vision)
    return tower or TokenTower(lambda pixels: encoder.encode_image_maps(pixels).flatten(2).transpose(1, 2))


def _open_clip_vit(visual: Any) -> TokenTower | None:
    blocks = getattr(visual, "transformer", None)
    if blocks is None or not getattr(blocks, "batch_first", True):
        return None
    return TokenTower(visual._embeds, list(blocks.resblocks), visual.ln_post, prefix=1)


def _timm_vit(trunk: Any) -> TokenTower | None:
    # EVA's layers also take a rotary position for each token, which a further token has none of.
    if not (hasattr(trunk, "blocks") and hasattr(trunk, "norm_pre")) or getattr(trunk, "rope", None) is not None:
        return None

    def embed(pixels: Tensor) -> Tensor:
        tokens: Tensor = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(pixels)))
        return tokens

    return TokenTower(embed, list(trunk.blocks), trunk.norm, prefix=int(trunk.num_prefix_tokens))


def _transformers_vit(vision: Any) -> TokenTower | None:
    layers = getattr(getattr(vision, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(vision, "post_layernorm"):
        return None
    before = getattr(vision, "pre_layrnorm", nn.Identity())  # transformers' own spelling

    def embed(pixels: Tensor) -> Tensor:
        tokens: Tensor = before(vision.embeddings(pixels))
        return tokens

    has_class_token = hasattr(vision.embeddings, "class_embedding")
    return TokenTower(embed, [_without_mask(layer) for layer in layers], vision.post_layernorm, int(has_class_token))


def _without_mask(layer: nn.Module) -> Step:
    """Layers of transformers take an attention mask too: every token sees every other."""

    def run(tokens: Tensor) -> Tensor:
        output = layer(tokens, None)
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        return hidden

    return run
