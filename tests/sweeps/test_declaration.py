from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.sweeps.declaration import Level, Sweep, find_sweep, read_sweep

SMALL = """
name: small
tasks: [demo_cxr_view]
models: [{model: medvlm-tiny}]
"""


def test_what_is_not_said_has_a_default(sweep_of: Callable[..., Sweep]) -> None:
    sweep = sweep_of(SMALL)
    (model,) = sweep.models
    assert (model.name, model.args, model.tasks, model.batch_size) == ("medvlm-tiny", {}, None, None)
    assert (sweep.axes, sweep.seeds, sweep.executor.kind, sweep.compare.references) == ({}, (), "local", ())


def test_an_axis_is_a_list_of_values_or_a_mapping_of_what_is_set(sweep_of: Callable[..., Sweep]) -> None:
    axes = (
        "axes: {precision: [fp32, null], resolution: [64, 1.5], reports: {clean: , typos: {metadata: {severity: 2}}}}"
    )
    sweep = sweep_of(SMALL + axes)
    assert sweep.axes["precision"] == (Level("fp32", {"precision": "fp32"}), Level("no-precision", {"precision": None}))
    assert [level.name for level in sweep.axes["resolution"]] == ["resolution64", "resolution1.5"]
    assert sweep.axes["reports"] == (Level("clean"), Level("typos", {}, {"severity": 2}))


def test_placeholders_are_filled_once_and_stay_text(sweep_of: Callable[..., Sweep]) -> None:
    text = "name: s\ntasks: [t]\nmodels: [{model: m, args: {pretrained: '${A}/x', other: '${B}', n: 3}}]"
    sweep = sweep_of(text, {"A": "$(touch evil) ${B}", "B": "[1, 2]"})
    assert sweep.models[0].args == {"pretrained": "$(touch evil) ${B}/x", "other": "[1, 2]", "n": 3}


def test_a_placeholder_may_have_a_default(sweep_of: Callable[..., Sweep]) -> None:
    text = "name: s\ntasks: [t]\nmodels: [{model: '${BACKEND:-medvlm-clip}', args: {pretrained: '${MODEL}'}}]"
    assert sweep_of(text, {"MODEL": "x"}).models[0].model == "medvlm-clip"
    assert sweep_of(text, {"MODEL": "x", "BACKEND": "chexzero"}).models[0].model == "chexzero"
    with pytest.raises(UserError, match=r"needs 1 more value: --set MODEL=\.\.\."):
        sweep_of(text)


def test_all_missing_placeholders_stand_in_one_line(sweep_of: Callable[..., Sweep]) -> None:
    text = "name: s\ntasks: [t]\nmodels: [{model: m, args: {pretrained: '${B}', peft: '${A}'}}]"
    with pytest.raises(UserError, match=r"sweep.yaml needs 2 more values: --set A=\.\.\. --set B=\.\.\."):
        sweep_of(text)
    with pytest.raises(UserError, match=r"no placeholder \$\{AA\} for --set AA. Did you mean A"):
        sweep_of(text, {"A": "x", "B": "y", "AA": "z"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taks: [x]", "unknown key 'taks'. Did you mean tasks"),
        ("executor: {parralel: 2}", "unknown key 'parralel'. Did you mean parallel"),
        ("executor: {kind: slum, minutes: 3}", "Unknown executor 'slum'. Did you mean slurm"),
        ("executor: {kind: slurm}", "expected `minutes:`"),
        ("executor: {parallel: 0}", "`parallel:` to be a number above 0"),
        ("executor: {parallel: true}", "`parallel:` to be a number above 0"),
        ("batch_size: -1", "`batch_size:` to be a positive whole number"),
        ("seeds: [0, 0]", "seeds: 0 stands there twice"),
        ("seeds: [x]", "list of whole numbers"),
        ("axes: {precision: fp32}", "axis precision to be a list of values"),
        ("axes: {precision: []}", "axis precision to be a list of values"),
        ("axes: {precision: [fp32, fp32]}", "fp32 stands there twice"),
        ("axes: {precision: [../x]}", "level of precision: expected a name"),
        ("axes: {precision: {a: {arg: 1}}}", "unknown key 'arg'. Did you mean args"),
        ("axes: {seed: [1]}", "seed cannot be an axis"),
        ("exclude: [{precision: fp32}]", "unknown axis 'precision'"),
        ("axes: {p: [ab, cd]}\nexclude: [{p: ac}]", "p has no level 'ac'"),
        ("axes: {p: [ab, cd]}\ninclude: [{p: [ab, cd]}]", "expected one level of p"),
        ("compare: {references: [{modle: x}]}", "unknown axis 'modle'. Did you mean model"),
        ("limit: 0", "`limit:` to be a number above 0"),
    ],
)
def test_wrong_input_says_what_was_expected(sweep_of: Callable[..., Sweep], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep_of(f"{SMALL}\n{text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: ../../elsewhere\ntasks: [t]\nmodels: [{model: m}]", "expected a name"),
        ("name: s\ntasks: [t]\nmodels: [{model: m, name: /x}]", "expected a name"),
        ("name: s\ntasks: [../evil/task.yaml]\nmodels: [{model: m}]", "list of names of tasks"),
        ("name: s\ntasks: [evil.yaml]\nmodels: [{model: m}]", "list of names of tasks"),
        (
            "name: s\ntasks: [t]\nmodels: [{model: hf, args: {trust_remote_code: true}}]",
            "may not say trust_remote_code",
        ),
        ("name: s\ntasks: [t]\nmodels: [{model: m}]\nmetadata: {allow_remote: true}", "may not say allow_remote"),
        ("name: s\ntasks: [t]\nmodels: [{model: m}]\nenvironment: {LD_PRELOAD: x.so}", "may not set LD_PRELOAD"),
        ("name: s\ntasks: [t]\nmodels: [{model: m}]\nenvironment: {PYTHONPATH: x}", "may not set PYTHONPATH"),
        (
            'name: s\ntasks: [t]\nmodels: [{model: m}]\nexecutor: {slurm: {partition: "a\\ntouch evil"}}',
            "slurm partition to be one word",
        ),
        ("name: s\ntasks: [t]\nmodels: [{model: m}]\nexecutor: {slurm: {setup: [touch evil]}}", "unknown key 'setup'"),
        ("name: !!python/object/apply:os.system ['touch evil']", "not valid YAML"),
    ],
)
def test_a_strangers_sweep_cannot_run_code(sweep_of: Callable[..., Sweep], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep_of(text)


def test_a_sweep_is_found_by_name_or_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL, encoding="utf-8")
    assert find_sweep(str(path)) == path
    assert find_sweep("quantization").name == "quantization.yaml"
    with pytest.raises(UserError, match="Did you mean quantization"):
        find_sweep("quantisation")
    assert read_sweep(path, {}).name == "small"
