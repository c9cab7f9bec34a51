"""`medvlm finetune`: train a small part on a base model that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvlm_harness.cli.data import known_dataset

if TYPE_CHECKING:
    from medvlm_harness.metrics.estimate import Estimate

__all__ = ["app"]

app = typer.Typer()


@app.command()
def finetune(
    method: Annotated[str, typer.Option(help="What is trained; docs/finetune.md describes the methods.")],
    output: Annotated[Path, typer.Option("--output", "--output-path", "--output_path", help="A new folder.")],
    model: Annotated[str, typer.Option(help="The base model: a name from `medvlm models`.")] = "",
    model_args: Annotated[
        str, typer.Option("--model-args", "--model_args", help="Its options, as for an evaluation: pretrained=DIR,...")
    ] = "",
    dataset: Annotated[str, typer.Option(help="Prepared set: iu_cxr or demo_cxr.")] = "iu_cxr",
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", "--data_dir", help="The prepared set's folder, if not where it is sought."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="key=value of the method; repeatable, see docs/finetune.md."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget; of several the first that is reached.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Budget in passes over the train split.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in batches.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", "-b", help="Studies in a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Of weights, order and whatever is drawn.")] = 0,
    eval_steps: Annotated[
        int | None, typer.Option("--eval-steps", "--eval_steps", help="Steps between evaluations; once an epoch.")
    ] = None,
    patience: Annotated[int, typer.Option(help="Evaluations without a better one that end it.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; chosen if not said.")] = None,
) -> None:
    """Train on the train split of a prepared set, choose by its validation split; test patients are never seen.

    A run that was killed goes on where it was when the same command is given again.
    """
    from medvlm_harness.data.locate import find_dataset
    from medvlm_harness.training.data import TrainingData
    from medvlm_harness.training.finetune import finetune as train
    from medvlm_harness.training.methods import Schedule, build_method

    known_dataset(dataset)
    schedule = Schedule(
        seconds=seconds,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        eval_steps=eval_steps,
        patience=patience,
    )
    built = build_method(method, option or [], model=model, model_args=model_args, device=device, schedule=schedule)
    data = TrainingData.of(find_dataset(dataset, data_dir=data_dir))
    trained = train(built, data, output.expanduser())
    typer.echo(
        f"{trained.steps} steps ({trained.epochs:.2f} epochs, {trained.seconds:.0f} s), ended by {trained.stopped_by}; "
        f"validation loss {trained.first_validation_loss:.3f} -> {trained.validation_loss:.3f} at step "
        f"{trained.best_step}, whose {trained.parameters:,} weights are kept"
    )
    for line in _validated(trained.validation):
        typer.echo(line)
    typer.echo(f"wrote {output}")
    typer.echo(f"evaluate:  medvlm run {built.evaluation(output)} --tasks ...")


def _validated(validation: Mapping[str, Estimate]) -> Iterator[str]:
    """A line for each metric; of those before and after, whether their difference is beyond its interval."""
    end = "_after_minus_before"
    gains = [name.removesuffix(end) for name in validation if name.endswith(end)]
    for metric in gains:
        before, after, difference = (validation[f"{metric}{kind}"] for kind in ("_before", "_after", end))
        low, high = difference.ci95
        told = "better" if low > 0 else "worse" if high < 0 else "no difference beyond its interval"
        yield f"validation {metric} {_cell(before)} -> {_cell(after)}, difference {_cell(difference)}: {told}"
    for name, estimate in validation.items():
        if not name.startswith(tuple(f"{metric}_" for metric in gains)):
            yield f"validation {name} {_cell(estimate)}"


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.ci95[0]:.3f}, {estimate.ci95[1]:.3f}]"
