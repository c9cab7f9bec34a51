from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.medbridge_adapter import (
    AdapterConfig,
    MedBridge,
    injection_of,
    sliding_windows,
    view_images,
)
from medvlm_harness.model_backends.tower_tokens import TokenTower

D, TOKENS = 16, 5
CONFIG = AdapterConfig(grid=2, queries=3, width=8, heads=2, dropout=0.0)


def layered(layers: int = 4) -> tuple[TokenTower, nn.ModuleList]:
    """A transformer tower over images of 5 values, each a token, behind a class token."""
    blocks = nn.ModuleList(
        nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(layers)
    )
    into = nn.Linear(1, D)
    held = nn.ModuleList([into, *blocks]).requires_grad_(False).eval()

    def embed(pixels: Tensor) -> Tensor:
        return functional.pad(into(pixels.flatten(1)[..., None]), (0, 0, 1, 0))

    return TokenTower(embed, list(blocks), nn.LayerNorm(D).requires_grad_(False), prefix=1), held


def flat() -> tuple[TokenTower, nn.ModuleList]:
    """A tower without layers."""
    into = nn.Linear(1, D).requires_grad_(False)
    return TokenTower(lambda pixels: into(pixels.flatten(1)[..., None])), nn.ModuleList([into])


def pixels(n: int = 4, views: int = CONFIG.views) -> Tensor:
    return torch.randn(n, views, 1, 1, TOKENS)


def bridge(towers: Sequence[TokenTower], config: AdapterConfig = CONFIG, labels: int = 3) -> MedBridge:
    torch.manual_seed(1)
    return MedBridge(towers, [D] * len(towers), labels, config).eval()


# --- views


@pytest.mark.parametrize("size", [(256, 256), (97, 61), (30, 211), (1, 1)])
@pytest.mark.parametrize(("grid", "crop"), [(1, 1.0), (2, 0.5), (2, 0.6), (3, 0.34), (3, 0.5)])
def test_the_windows_cover_every_pixel_of_the_image(size: tuple[int, int], grid: int, crop: float) -> None:
    numbered = np.arange(size[0] * size[1], dtype=np.int32).reshape(size[1], size[0])
    views = list(view_images(Image.fromarray(numbered), sliding_windows(grid), crop))
    assert len(views) == 1 + grid**2
    assert np.array_equal(np.asarray(views[0]), numbered)
    seen = {int(value) for view in views[1:] for value in np.asarray(view).ravel()}
    assert seen == set(range(numbered.size))  # every pixel, and none beyond the edges (which would be 0 anew)
    assert {view.size for view in views[1:]} <= {
        (w, h)
        for w in range(int(crop * size[0]), int(crop * size[0]) + 3)
        for h in range(int(crop * size[1]), int(crop * size[1]) + 3)
    }


def test_neighbouring_windows_overlap() -> None:
    views = list(view_images(Image.fromarray(np.arange(100, dtype=np.int32)[None]), [(0.0, 0.5), (1.0, 0.5)], 0.6))
    left, right = (set(np.asarray(view).ravel().tolist()) for view in views[1:])
    assert left & right == set(range(40, 60))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 3, "crop": 0.3}, "leave gaps"),
        ({"grid": -1}, "grid"),
        ({"queries": 0}, "queries"),
        ({"split": 1.5}, "split"),
        ({"width": 10, "heads": 4}, "multiple of heads"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdapterConfig(**options)  # type: ignore[arg-type]


# --- queries


def test_queries_go_through_the_frozen_layers_from_the_split_on() -> None:
    tower, held = layered()
    calls: list[tuple[int, int]] = []
    for number, block in enumerate(tower.layers):
        block.register_forward_pre_hook(  # type: ignore[attr-defined]
            lambda module, args, number=number: calls.append((number, args[0].shape[1]))
        )
    bridge([tower])(bridge([tower]).stems([pixels()]))
    with_class = TOKENS + 1
    # T1 is half of four layers: two without queries, two with three of them.
    assert calls == [(0, with_class), (1, with_class), (2, with_class + 3), (3, with_class + 3)]
    assert injection_of(tower) == "inside"
    assert len(held) == 5


@pytest.mark.parametrize(("split", "first"), [(0.0, 0), (0.5, 2), (1.0, 3)])
def test_at_least_one_layer_sees_the_queries(split: float, first: int) -> None:
    tower, _ = layered()
    config = AdapterConfig(grid=0, queries=3, width=8, heads=2, split=split)
    assert bridge([tower], config).adapters[0].first == first  # type: ignore[union-attr]


def test_the_image_tokens_see_the_queries_and_the_queries_the_image() -> None:
    tower, _ = layered()
    module, x = bridge([tower]), pixels()
    (stem,) = module.stems([x])
    inside = module.adapters[0]
    before = inside(stem.flatten(0, 1))
    other = inside(module.stems([x + 1])[0].flatten(0, 1))
    assert (before[:, 1:] - other[:, 1:]).abs().max() > 1e-3
    with torch.no_grad():
        inside.queries.add_(torch.randn(3, D))
    moved = inside(stem.flatten(0, 1))
    assert (before[:, 0] - moved[:, 0]).abs().max() > 1e-4


def test_queries_read_a_map_where_a_tower_has_no_layers() -> None:
    tower, _ = flat()
    module, x = bridge([tower]), pixels()
    after = module.adapters[0]
    assert injection_of(tower) == "after"
    before = after(module.stems([x])[0].flatten(0, 1))
    with torch.no_grad():
        after.queries.add_(1.0)
    moved = after(module.stems([x])[0].flatten(0, 1))
    assert torch.equal(before[:, 0], moved[:, 0])  # the frozen token is the tower's alone
    assert (before[:, 1:] - moved[:, 1:]).abs().max() > 1e-3


# --- views and experts together


def test_the_order_of_the_views_does_not_matter_and_each_view_does() -> None:
    tower, _ = layered()
    module, x = bridge([tower]), pixels()
    with torch.no_grad():
        answer = module(module.stems([x]))
        turned = module(module.stems([x.flip(1)]))
        other = x.clone()
        other[:, 3] = 5.0
        changed = module(module.stems([other]))
    assert (answer - turned).abs().max() < 1e-5
    assert ((answer - changed).abs().amax(dim=1) > 1e-4).all()


def test_an_image_is_answered_alike_alone_and_among_others() -> None:
    module, x = bridge([layered()[0], flat()[0]]), pixels()
    with torch.no_grad():
        together = module(module.stems([x, x]))
        alone = torch.cat([module(module.stems([one[None], one[None]])) for one in x])
    assert (together - alone).abs().max() < 1e-5


def test_routing_is_a_mixture_that_depends_on_the_queries() -> None:
    module = bridge([layered()[0], flat()[0]])
    tokens = torch.randn(6, 2, 1 + CONFIG.queries, CONFIG.width)
    weights = module.routing(tokens)
    assert weights.shape == (6, 2)
    assert torch.allclose(weights.sum(dim=1), torch.ones(6))
    assert weights.std(dim=0).min() > 1e-3
    frozen = tokens.clone()
    frozen[:, :, 0] += 3.0
    assert torch.equal(module.routing(frozen), weights)  # frozen tokens route nothing


def test_an_expert_of_weight_zero_does_not_count() -> None:
    module, x = bridge([layered()[0], layered()[0]]), pixels()
    with torch.no_grad():
        module.route[0].bias.fill_(100.0)  # type: ignore[operator,union-attr]
        answer = module(module.stems([x, x]))
        ignored = module(module.stems([x, x + 1]))
        counted = module(module.stems([x + 1, x]))
    assert torch.equal(answer, ignored)
    assert (answer - counted).abs().max() > 1e-3


# --- what learns


def test_gradients_reach_queries_routing_and_head_and_no_tower() -> None:
    (inside, held), (after, places) = layered(), flat()
    module = bridge([inside, after])
    loss = module(module.stems([pixels(), pixels()])).square().sum()
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in [*held.parameters(), *places.parameters()])
    learnt = {name.split(".")[0] for name in module.state_dict()}
    assert learnt == {"experts", "across_norm", "across_views", "route", "before_head", "head"}


def test_a_step_moves_the_adapter_and_leaves_the_tower_as_it_was() -> None:
    tower, held = layered()
    module = bridge([tower])
    frozen = {name: value.clone() for name, value in held.state_dict().items()}
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(module.stems([pixels()])).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, frozen[name]) for name, value in held.state_dict().items())
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, trained[name])]
    assert {"experts.0.queries", "head.weight"} <= set(moved)


def test_what_is_kept_of_a_tower_needs_no_gradient() -> None:
    module = bridge([layered()[0], flat()[0]])
    stems = module.stems([pixels(), pixels()])
    assert not any(one.requires_grad for one in stems)
    assert [one.shape for one in stems] == [(4, 5, TOKENS + 1, D), (4, 5, TOKENS, D)]


def test_queries_start_apart() -> None:
    queries = bridge([layered()[0]]).adapters[0].queries
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(queries))
