"""`medvlm data`: prepare data sets and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medvlm_harness.cli.output import print_table
from medvlm_harness.errors import UserError, near_matches

if TYPE_CHECKING:
    from medvlm_harness.labelers.base import Labeler

__all__ = ["DATASETS", "app", "known_dataset"]

app = typer.Typer(help="Prepare data sets and look at them.", no_args_is_help=True)

DATASETS = ("iu_cxr", "demo_cxr")
SHOWN_NAMES = 10  # of what a rule removed; the rest is in the log


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="Data set: iu_cxr or demo_cxr.")],
    source: Annotated[Path | None, typer.Option(help="Folder as downloaded; its layout is detected.")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            help="Table of labels, keyed by filename or uid; or a labeler that reads the reports: rules, "
            "rules,sections=findings. Repeatable."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the prepared set.")] = None,
    split_scheme: Annotated[
        str, typer.Option("--split-scheme", "--split_scheme", help="r2gen, or hash: 70/10/20 by patient.")
    ] = "r2gen",
    layout: Annotated[str | None, typer.Option(help="kaggle, openi or r2gen, if several lie there.")] = None,
) -> None:
    """Read a data set once, check every image, and write its records."""
    from medvlm_harness.data.locate import data_root

    known_dataset(name)
    folder = (out or data_root() / name).expanduser()
    if name == "demo_cxr":
        from medvlm_harness.demo.generate import prepare_demo

        if source or labels or layout:
            raise UserError("demo_cxr is drawn, not read: leave out --source, --labels and --layout.")
        typer.echo(f"wrote {prepare_demo(folder)}")
        return
    if source is None:
        raise UserError(f"Expected --source DIR, the folder of {name} as downloaded.")
    from medvlm_harness.data.prepare import prepare_iu_cxr

    table, labelers = _label_sources(labels or [])
    columns = (TextColumn("checking images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("images", total=None)
        report = prepare_iu_cxr(
            source,
            labels=table,
            out=folder,
            labelers=labelers,
            split_scheme=split_scheme,  # type: ignore[arg-type]  # checked there, with near matches
            layout=layout,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    _print_report(report)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Data set: iu_cxr or demo_cxr.")],
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", "--data_dir", help="The prepared set's folder, if not where it is sought."),
    ] = None,
) -> None:
    """Splits, label supports, section coverage, subgroups, and agreement between label sources."""
    from medvlm_harness.data.info import describe
    from medvlm_harness.data.locate import find_dataset

    known_dataset(name)
    dataset = find_dataset(name, data_dir=data_dir)
    summary = describe(dataset)
    manifest = dataset.manifest
    typer.echo(
        f"{name}: {dataset.folder} (layout {manifest.source}, licence {manifest.licence}, {dataset.sha256[:12]})"
    )
    for policy, value in manifest.policies.items():
        typer.echo(f"  {policy}: {value}")
    print_table(
        "Splits",
        ["Split", "Studies", "Images", "Frontal", "Lateral", "View unknown", "Without image", "Without frontal"],
        [[s.split, s.studies, s.images, s.frontal, s.lateral, s.view_unknown, s.without_image, s.without_frontal]
         for s in summary.splits],
    )  # fmt: skip
    print_table(
        "Labels (studies)",
        ["Source", "Label", "Positive", "Negative", "Uncertain", "Unmentioned", "Unlabelled"],
        [[s.source, s.label, s.positive, s.negative, s.uncertain, s.unmentioned, s.unlabelled] for s in summary.labels],
    )
    print_table(
        "Sections",
        ["Section", "Studies", "With a de-identified word"],
        [[s.section, s.studies, s.with_token] for s in summary.sections],
    )
    print_table(
        "Subgroups (studies)",
        ["Subgroup", "Value", "Studies", "Share"],
        [[s.attribute, s.value or "(not said)", s.studies, f"{s.share:.1%}"] for s in summary.subgroups],
    )
    print_table(
        "Agreement between label sources (Cohen's kappa; uncertain left out, unmentioned negative)",
        ["Label", "Sources", "Studies", "Kappa"],
        [[a.label, f"{a.first} / {a.second}", a.studies, f"{a.kappa:.2f}"] for a in summary.agreement],
    )


def known_dataset(name: str) -> None:
    """Refuse what is no data set of ours.

    Raises:
        UserError: with near matches.
    """
    if name not in DATASETS:
        raise UserError(f"Unknown data set {name!r}.{near_matches(name, DATASETS)}")


def _label_sources(labels: list[str]) -> tuple[Path | None, list[Labeler]]:
    """What --labels names: at most one table, and labelers; a file wins over a labeler of its name."""
    from medvlm_harness.labelers.base import LABELERS, labeler_from_text

    tables, labelers = [], []
    for text in labels:
        path = Path(text).expanduser()
        if path.is_file():
            tables.append(path)
        elif text.partition(",")[0].strip() in LABELERS:
            labelers.append(labeler_from_text(text))
        else:
            known = ", ".join(LABELERS)
            raise UserError(f"Expected --labels to be a table or a labeler ({known}), but {text} is neither.")
    if len(tables) > 1:
        raise UserError(f"Expected one table of labels, but got {' and '.join(map(str, tables))}.")
    return (tables[0] if tables else None), labelers


def _print_report(report: Any) -> None:
    from medvlm_harness.data.prepare import LOG_FILE

    typer.echo(f"read {report.studies_read} studies and {report.images_read} images (layout {report.layout})")
    for title, rules in (("dropped", report.dropped), ("noted", report.noted)):
        for rule, names in rules.items():
            shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
            typer.echo(f"  {title}: {len(names)} {rule.replace('_', ' ')} ({shown})")
    for warning in report.warnings:
        typer.echo(f"  warning: {warning}")
    rows = [[split, *counts.values()] for split, counts in report.splits.items() if counts["studies"]]
    print_table("Prepared", ["Split", "Studies", "Images", "Frontal", "Lateral", "View unknown"], rows)
    typer.echo(f"wrote {report.folder} (every name above: {LOG_FILE} there)")
