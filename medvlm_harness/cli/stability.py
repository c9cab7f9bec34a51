"""`medvlm run --seeds` and `--prompt-sets`: one complete run after the other, and what differs between them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import typer

from medvlm_harness import plugin
from medvlm_harness.errors import UserError
from medvlm_harness.files import write_json
from medvlm_harness.results.stability import Condition, stability, stability_table

__all__ = ["Variants", "run_variants", "variants"]

_log = logging.getLogger("lm_eval.medvlm")

LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one


class Variants(NamedTuple):
    """The runs that were asked for."""

    conditions: list[Condition]
    arguments: list[Any]  # of each, what `lm_eval run` parses
    seeded: list[str]  # where their seeds go to


def variants(arguments: Any, seeds: str | None, prompt_sets: str | None) -> Variants:
    """The arguments of each run: every prompt set with every seed.

    A seed goes to lm-eval's own --seed, to the keys of --metadata that a chosen task takes a seed by, and to the
    model's option `seed`.

    Args:
        arguments: the parsed namespace of `lm_eval run`.
        seeds: whole numbers with commas between them.
        prompt_sets: values of the model's option `prompts`, likewise.

    Raises:
        UserError: for values that cannot be, what is given twice, or a model that cannot take its prompts.
    """
    if seeds is None and prompt_sets is None:
        return Variants([Condition()], [arguments], [])
    from lm_eval.api.registry import get_model
    from lm_eval.config.evaluate_config import EvaluatorConfig

    numbers = _seeds(seeds)
    sets = _distinct("--prompt-sets", prompt_sets, "different names, such as task,published")
    config = EvaluatorConfig.from_cli(arguments)
    backend = get_model(config.model)
    options: frozenset[str] = backend.options() if hasattr(backend, "options") else frozenset()
    if config.use_cache:
        raise UserError("Leave out --use_cache: it answers for one seed or prompt set with what another one gave.")
    keys, seed_option = (_seed_keys(config), options & {"seed"}) if numbers else ([], frozenset())
    if numbers and arguments.seed is not None:
        raise UserError("Expected --seeds or --seed, but got both.")
    _refuse_both("--seeds", config.metadata.keys() & {*keys, *seed_option})
    if sets:
        if "prompts" not in options:
            raise UserError(
                f"Expected --prompt-sets with a model that has the option prompts, but {config.model} has none."
            )
        _refuse_both("--prompt-sets", config.model_args.keys() & {"prompts"})
    conditions, runs = [], []
    for prompts in sets or (None,):
        model_args = config.model_args if prompts is None else _with_prompts(config.model_args, prompts, sets)
        if prompts is not None:
            backend.create_from_arg_obj(model_args)  # refuses prompts that the model has not; reads no weights
        for seed in numbers or (None,):
            one = copy(arguments)
            one.model_args = {**model_args, **dict.fromkeys(seed_option, seed)}
            if seed is not None:
                one.seed = [seed] * 4  # of Python, NumPy, torch and few-shot examples
            one.metadata = {**config.metadata, **one.model_args, **dict.fromkeys(keys, seed)}
            conditions.append(Condition(seed, prompts))
            runs.append(one)
    seeded = ["--seed", *(f"--metadata {key}" for key in keys), *(f"--model_args {key}" for key in seed_option)]
    return Variants(conditions, runs, seeded if numbers else [])


def run_variants(command: Any, asked: Variants) -> None:
    """Run several, print how far the metrics spread, and write it beside the results where there is an output path.

    Of several processes the first has the results, and says so alone.

    Args:
        command: lm-eval's command line.
        asked: what `variants` gives.
    """
    from medvlm_harness.results.scores import results_file

    results: list[Mapping[str, Any]] = []
    files: list[Path] = []

    def keep(of_run: Mapping[str, Any], tracker: Any) -> None:
        results.append({key: of_run[key] for key in ("results", "medvlm") if key in of_run})
        if tracker.output_path:
            files.append(results_file(tracker))

    plugin.scope.finished = keep
    try:
        for number, (condition, arguments) in enumerate(zip(asked.conditions, asked.arguments, strict=True), 1):
            _log.info("run %d of %d: %s", number, len(asked.conditions), condition)
            gc.collect()  # the model of the run before is in cycles, and this one may load its own
            command.execute(arguments)
    finally:
        plugin.scope.finished = None
    if not results:
        return
    block = stability(asked.conditions, results, seeded=asked.seeded)
    typer.echo(stability_table(block))
    if files:
        for run, file in zip(block["runs"], files, strict=True):
            run["results"] = file.name if file.is_file() else None  # lm-eval says only in its log that it could not
        path = files[0].with_name(f"stability_{datetime.now().isoformat().replace(':', '-')}.json")
        write_json(path, block)
        typer.echo(f"wrote {path}")


def _seeds(text: str | None) -> list[int]:
    expected = f"different whole numbers from 0 to {LARGEST_SEED}, such as 0,1,2"
    found = _distinct("--seeds", text, expected)
    if not all(one.isdecimal() and int(one) <= LARGEST_SEED for one in found) or len(set(map(int, found))) < len(found):
        raise UserError(f"Expected --seeds to be {expected}, but got {text!r}.")
    return [int(one) for one in found]


def _distinct(option: str, text: str | None, expected: str) -> list[str]:
    """What stands between the commas; nothing where the option was not given."""
    if text is None:
        return []
    found = [one.strip() for one in text.split(",")]
    if "" in found or len(set(found)) < len(found):
        raise UserError(f"Expected {option} to be {expected}, but got {text!r}.")
    return found


def _seed_keys(config: Any) -> list[str]:
    """The keys of --metadata by which the chosen tasks take seeds."""
    manager = config.process_tasks(config.metadata)
    tasks = manager.load(config.tasks)["tasks"].values()
    return sorted({key for task in tasks if getattr(task, "is_medvlm", False) for key in task.seed_keys()})


def _with_prompts(model_args: Mapping[str, Any], name: str, sets: Sequence[str]) -> dict[str, Any]:
    """The model's options under one prompt set; a file of the published prompts goes with those alone."""
    others = {"prompts_file"} if name != "published" and "published" in sets else set()
    return {**{key: value for key, value in model_args.items() if key not in others}, "prompts": name}


def _refuse_both(option: str, given: Iterable[str]) -> None:
    for one in sorted(given):
        raise UserError(f"Expected {option} or {one}=..., but got both.")
