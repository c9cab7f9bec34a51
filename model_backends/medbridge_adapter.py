"""MedBridge's adapter: several views of an image, learnable queries in frozen encoders, and a mixture over them.

Source: Li, Ghahremani, Wachinger, "MedBridge", arXiv 2505.21698. Neither code nor weights are public: this is written
from the paper's description, and is not the authors' model.

The paper's: one resized view of the whole image and high-resolution crops of it, random or by a sliding window; each
view through frozen encoders ("experts"); Q learnable query tokens put in after the first T1 layers, which go through
the other frozen layers with the image's own tokens; self-attention across the views and a maximum over them, which give
each expert's frozen and query tokens; queries that route a mixture of the experts; a multi-label head.

Ours, where we know of no statement of the paper's: every number in `AdapterConfig`; windows on a grid; an expert's
frozen token of a view is the mean of its image tokens behind the last layer; projection of each expert to one width
before the attention across views, which frozen and query tokens go through alike, each with its counterparts of the
other views; routing by a softmax over the experts of one number per expert, linear in the mean of its queries; the
mixture is of the concatenated frozen and query tokens; a linear head. Towers without token layers (CNNs, Swin) have
nothing to put queries into: there the queries read the last feature map by a cross-attention block of the adapter's
own, behind the frozen tower (`injection: after` instead of `inside`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.tower_tokens import Step, TokenTower

__all__ = ["AdapterConfig", "Injection", "MedBridge", "Window", "injection_of", "sliding_windows", "view_images"]

Injection = Literal["inside", "after"]
Window = tuple[float, float]
"""Left and upper edge of a crop, as shares of the width and height that the crop leaves over, in [0, 1]."""


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of an adapter; all of them are our choices.

    Raises:
        UserError: if a value is out of its range.
    """

    grid: int = 2  # windows per side: 1 + grid ** 2 views; 0: the whole image alone
    crop: float = 0.6  # side of a window, as a share of the image's
    queries: int = 8  # Q, per expert
    split: float = 0.5  # T1, as a share of a tower's layers
    width: int = 128  # that all experts are projected to
    heads: int = 4
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name, low, high in (("grid", 0, 8), ("queries", 1, 256), ("heads", 1, 64), ("width", 1, 4096)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"Expected {name} of the adapter to be an integer in {low} to {high}, got {value!r}.")
        for name in ("crop", "split", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"Expected {name} of the adapter in [0, 1], but got {getattr(self, name)!r}.")
        if self.width % self.heads:
            raise UserError(f"Expected width to be a multiple of heads, but got {self.width} and {self.heads}.")
        if self.grid and self.crop * self.grid < 1:
            raise UserError(f"Windows of crop={self.crop} on a grid of {self.grid} leave gaps: crop >= 1 / grid.")

    @property
    def views(self) -> int:
        """N: the whole image and its windows."""
        return 1 + self.grid**2


def sliding_windows(grid: int) -> list[Window]:
    """The windows of a grid, row by row, the first at the image's upper left corner and the last at its lower right."""
    steps = [place / (grid - 1) if grid > 1 else 0.5 for place in range(grid)]
    return [(x, y) for y in steps for x in steps]


def view_images(image: Image, windows: Sequence[Window], crop: float) -> Iterator[Image]:
    """The whole image, and its windows as it was stored: nothing is resized here.

    Edges are rounded outwards, so that windows that cover the image by their shares cover its pixels.
    """
    yield image
    for x, y in windows:
        left, upper = x * (1 - crop) * image.width, y * (1 - crop) * image.height
        right, lower = left + crop * image.width, upper + crop * image.height
        rounded = math.ceil(right - 1e-6), math.ceil(lower - 1e-6)  # 0.4 + 0.6 is not to be a pixel more than 1
        yield image.crop((math.floor(left), math.floor(upper), *rounded))


def injection_of(tower: TokenTower) -> Injection:
    """Whether queries go through a tower's own layers, or read what it gives."""
    return "inside" if tower.layers else "after"


class _Inside(nn.Module):
    """Queries that go through the frozen layers from T1 on, together with the tokens of a view."""

    def __init__(self, tower: TokenTower, d: int, config: AdapterConfig) -> None:
        super().__init__()
        self.tower, self.d = tower, d  # a dataclass: its modules are not this one's, neither trained nor saved with it
        self.first = min(round(config.split * len(tower.layers)), len(tower.layers) - 1)  # T1
        self.queries = nn.Parameter(0.02 * torch.randn(config.queries, d))
        self.project = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, config.width))

    def stem(self, pixels: Tensor) -> Tensor:
        """What comes before the queries: (m, channels, height, width) -> (m, tokens, d)."""
        return self.tower.run(self.tower.embed(pixels), 0, self.first)

    def forward(self, tokens: Tensor) -> Tensor:
        """(m, tokens, d) -> the frozen token and the queries, (m, 1 + Q, width)."""
        queries = self.queries.expand(len(tokens), *self.queries.shape)
        after = self.tower.run(torch.cat([tokens, queries], dim=1), self.first)
        image, queries = after[:, self.tower.prefix : tokens.shape[1]], after[:, tokens.shape[1] :]
        projected: Tensor = self.project(torch.cat([image.mean(dim=1, keepdim=True), queries], dim=1))
        return projected


class _After(nn.Module):
    """Queries that read the positions of a frozen feature map by cross-attention."""

    def __init__(self, tower: TokenTower, d: int, config: AdapterConfig) -> None:
        super().__init__()
        self.tower, self.d = tower, d
        width = config.width
        self.queries = nn.Parameter(0.02 * torch.randn(config.queries, width))
        self.project = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width))
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.feed_forward = _feed_forward(width)

    def stem(self, pixels: Tensor) -> Tensor:
        """The whole frozen tower: (m, channels, height, width) -> (m, places, d)."""
        return self.tower.embed(pixels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(m, places, d) -> the frozen token and the queries, (m, 1 + Q, width)."""
        places = self.project(tokens)
        queries = self.queries.expand(len(tokens), *self.queries.shape)
        queries = queries + self.attention(queries, places, places, need_weights=False)[0]
        queries = queries + self.feed_forward(queries)
        return torch.cat([self.project(tokens.mean(dim=1, keepdim=True)), queries], dim=1)


class MedBridge(nn.Module):
    """The trained part; the towers are only referred to, so its state dict holds what was learnt and nothing else.

    Args:
        towers: the experts' frozen image towers.
        widths: d of each one's tokens.
        labels: number of labels.
        config: sizes.
    """

    def __init__(self, towers: Sequence[TokenTower], widths: Sequence[int], labels: int, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapters = [
            (_Inside if injection_of(tower) == "inside" else _After)(tower, d, config)
            for tower, d in zip(towers, widths, strict=True)
        ]
        self.experts = nn.ModuleList(self.adapters)
        self.across_norm = nn.LayerNorm(config.width)
        self.across_views = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.route = nn.ModuleList(nn.Linear(config.width, 1) for _ in towers)
        size = config.width * (1 + config.queries)
        self.before_head = nn.Sequential(nn.LayerNorm(size), nn.Dropout(config.dropout))
        self.head = nn.Linear(size, labels)

    @torch.no_grad()
    def stems(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """What of the towers depends on no trained parameter, and so may be computed once and kept.

        Args:
            pixels: per expert (n, views, channels, height, width).

        Returns:
            Per expert (n, views, tokens, d).
        """
        return [_per_view(expert.stem, views) for expert, views in zip(self.adapters, pixels, strict=True)]

    def forward(self, stems: Sequence[Tensor]) -> Tensor:
        """What `stems` gave -> logits (n, labels)."""
        tokens = torch.stack([self._tokens(expert, one) for expert, one in zip(self.adapters, stems, strict=True)], 1)
        mixture = (self.routing(tokens)[:, :, None, None] * tokens).sum(dim=1)  # (n, 1 + Q, width)
        logits: Tensor = self.head(self.before_head(mixture.flatten(1)))
        return logits

    def routing(self, tokens: Tensor) -> Tensor:
        """Weights of the experts, (n, experts, 1 + Q, width) -> (n, experts); they sum to 1."""
        queries = tokens[:, :, 1:].mean(dim=2)
        return torch.cat([route(queries[:, k]) for k, route in enumerate(self.route)], dim=1).softmax(dim=1)

    def _tokens(self, expert: _Inside | _After, stem: Tensor) -> Tensor:
        """One expert's frozen and query tokens, each the maximum over the views: (n, 1 + Q, width)."""
        tokens = _per_view(expert, stem).transpose(1, 2)  # (n, 1 + Q, views, width)
        rows = tokens.flatten(0, 1)
        normed = self.across_norm(rows)
        rows = rows + self.across_views(normed, normed, normed, need_weights=False)[0]
        return torch.unflatten(rows.amax(dim=1), 0, tokens.shape[:2])


def _per_view(step: Step, views: Tensor) -> Tensor:
    """What takes (m, ...) on (n, views, ...)."""
    return torch.unflatten(step(views.flatten(0, 1)), 0, views.shape[:2])


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
