from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.sweeps.cells import Cell, choose, make_cells
from medvlm_harness.sweeps.declaration import Sweep

GRID = """
name: grid
tasks: [demo_cxr_view, demo_cxr_zeroshot]
batch_size: 8
limit: 20
models:
  - {name: small, model: medvlm-tiny, args: {prompts: task, precision: fp32}}
  - {name: large, model: medvlm-clip, args: {pretrained: /models/large}, tasks: [demo_cxr_view], batch_size: 4}
axes:
  quantization: [null, int8]
  reports: {clean: {}, typos: {metadata: {perturbation: {name: typos, severity: 2}}}}
"""


def option(cell: Cell, name: str) -> str | None:
    return cell.arguments[cell.arguments.index(name) + 1] if name in cell.arguments else None


def test_every_combination_is_a_cell_with_a_readable_name(sweep_of: Callable[..., Sweep]) -> None:
    cells = make_cells(sweep_of(GRID + "seeds: [0, 3]"))
    assert len(cells) == len({cell.key for cell in cells}) == 2 * 2 * 2 * 2
    assert cells[0].name == "small-no-quantization-clean-seed0"
    assert cells[-1].name == "large-int8-typos-seed3"
    assert cells[-1].place == {"model": "large", "quantization": "int8", "reports": "typos", "seed": "3"}


def test_a_cell_has_what_sweep_model_and_levels_say(sweep_of: Callable[..., Sweep]) -> None:
    cells = {cell.name: cell for cell in make_cells(sweep_of(GRID))}
    plain, changed = cells["small-no-quantization-clean"], cells["large-int8-typos"]
    assert (plain.args, plain.tasks) == (
        {"prompts": "task", "precision": "fp32"},
        ("demo_cxr_view", "demo_cxr_zeroshot"),
    )
    assert [option(plain, name) for name in ("--batch_size", "--limit", "--seeds", "--metadata")] == [
        "8",
        "20",
        None,
        None,
    ]
    assert option(plain, "--tasks") == "demo_cxr_view,demo_cxr_zeroshot"
    assert option(changed, "--model_args") == "pretrained=/models/large,quantization=int8"
    assert (option(changed, "--batch_size"), option(changed, "--tasks")) == ("4", "demo_cxr_view")
    assert json.loads(option(changed, "--metadata") or "") == {"perturbation": {"name": "typos", "severity": 2}}


def test_a_level_may_take_tasks_away(sweep_of: Callable[..., Sweep]) -> None:
    text = GRID.replace("{metadata: {perturbation", "{tasks: [demo_cxr_zeroshot], metadata: {perturbation")
    cells = {cell.name: cell.tasks for cell in make_cells(sweep_of(text))}
    assert cells["small-int8-clean"] == ("demo_cxr_view", "demo_cxr_zeroshot")
    assert cells["small-int8-typos"] == ("demo_cxr_zeroshot",)
    assert "large-int8-clean" in cells and "large-int8-typos" not in cells  # none of its tasks is left


def test_exclude_takes_away_and_include_adds(sweep_of: Callable[..., Sweep]) -> None:
    text = "exclude: [{quantization: int8, reports: typos}, {model: large, reports: [clean, typos]}]\n"
    cells = make_cells(sweep_of(GRID + text + "include: [{model: large}]"))
    names = [cell.name for cell in cells]
    assert names == ["small-no-quantization-clean", "small-no-quantization-typos", "small-int8-clean", "large"]
    assert option(cells[-1], "--model_args") == "pretrained=/models/large"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exclude: [{model: small}, {model: small, quantization: int8}, {model: large}]", "no cell is left"),
        ("include: [{model: small, quantization: null, reports: clean}]", "are one key"),
        ("include: [{reports: clean}]", "include reports=clean to name its model"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(sweep_of: Callable[..., Sweep], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_cells(sweep_of(GRID + text))


def test_a_line_of_exclude_that_fits_nothing_is_refused(sweep_of: Callable[..., Sweep]) -> None:
    lines = "exclude: [{quantization: int8}]\n"
    make_cells(sweep_of(GRID + lines))
    with pytest.raises(UserError, match="exclude seed=1, reports=clean fits no cell"):
        made = replace(sweep_of(GRID + "seeds: [0]"), exclude=({"seed": ("1",), "reports": ("clean",)},))
        make_cells(made)


def test_two_axes_cannot_set_one_option(sweep_of: Callable[..., Sweep]) -> None:
    axes = "axes: {precision: [bf16], rounding: {int8: {args: {precision: fp32}}}}"
    with pytest.raises(UserError, match="precision and rounding both set precision"):
        make_cells(sweep_of("name: s\ntasks: [t]\nmodels: [{model: m}]\n" + axes))


def test_the_key_changes_with_what_decides_and_with_nothing_else(sweep_of: Callable[..., Sweep]) -> None:
    text = "name: s\nsummary: one\ntasks: [t]\nmodels: [{model: m}]\n"

    def key(more: str, replaced: str = text) -> str:
        (cell,) = make_cells(sweep_of(replaced + more))
        return cell.key

    assert key("") == key("executor: {parallel: 3}") == key("", text.replace("one", "two"))
    others = ["limit: 3", "batch_size: 2", "seeds: [0]", "seeds: [1]", "environment: {OMP_NUM_THREADS: 1}"]
    others += ["metadata: {split: test}", "axes: {precision: [fp32]}"]
    assert len({key(""), *(key(more) for more in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "args",
    [
        {"pretrained": "/a/b-c.pt", "n": 3},
        {"pretrained": "a b,c=d"},
        {"pretrained": "007", "other": "true"},
        {"threshold": 0.5, "flag": True, "names": ["a", "b"]},
        {"pretrained": "$(touch evil); `x`", "window": "64px"},
        {"pretrained": "None"},
        {"pretrained": "1e5", "negative": -3},
    ],
)
def test_lm_eval_reads_the_options_as_they_were_meant(args: dict[str, Any], sweep_of: Callable[..., Sweep]) -> None:
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    sweep = sweep_of("name: s\ntasks: [t]\nmodels: [{model: m}]")
    sweep = replace(sweep, models=(replace(sweep.models[0], args=args),))
    (cell,) = make_cells(sweep)
    words = shlex.split(cell.command(Path("a b")))
    assert words[0] == "medvlm" and words[-1] == "a b"
    parser = HarnessCLI()._parser
    assert EvaluatorConfig.from_cli(parser.parse_args(words[1:])).model_args == args


def test_cells_are_chosen_by_name_or_pattern(sweep_of: Callable[..., Sweep]) -> None:
    cells = make_cells(sweep_of(GRID))
    assert choose(cells, []) == cells
    assert [cell.name for cell in choose(cells, ["small-int8-clean", "large-*-typos"])] == [
        "small-int8-clean",
        "large-no-quantization-typos",
        "large-int8-typos",
    ]
    with pytest.raises(UserError, match="Did you mean small-int8-clean"):
        choose(cells, ["small-int8-clea"])
