"""`medvlm tokenizers`: what tokenizers make of reports, and a vocabulary learnt from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from medvlm_harness.cli.data import DATASETS, known_dataset
from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medvlm_harness.model_backends.tokenizer_files import ReportTokenizer

__all__ = ["app"]

app = typer.Typer(help="What tokenizers make of reports; `train` learns a vocabulary from them.")

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", "--data_dir", help="The prepared set's folder, if not where it is sought."),
]


class _Texts(NamedTuple):
    """Reports to measure."""

    name: str
    splits: tuple[str, ...]  # of a prepared set
    split_scheme: str | None
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    without_text: int


@app.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    texts: Annotated[
        str, typer.Option(help="A prepared set (iu_cxr, demo_cxr), a table of reports, or a .txt with one a line.")
    ] = "",
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder, tokenizer.json, GGUF file or Hub name, or open_clip:MODEL; LABEL=... names it. Repeatable; "
            "differences are the first one's less each other's."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a prepared set: test, train+validation, all.")] = (
        "train+validation+test"
    ),
    text_column: Annotated[
        list[str] | None,
        typer.Option("--text-column", "--text_column", help="Of a table: the column with the report; repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--output-path", "--output_path", help="Folder for JSON, CSV, Markdown and a plot."),
    ] = None,
    data_dir: DataDir = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Measure what tokenizers make of reports: length, fertility, truncation, unknown words, medical terms."""
    if context.invoked_subcommand is not None:
        if texts or tokenizer or output:
            raise UserError(f"Expected options after the command: medvlm tokenizers {context.invoked_subcommand} ...")
        return
    if not texts or not tokenizer:
        raise UserError("Expected --texts iu_cxr and one or more --tokenizer NAME.")
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"Expected --output to be a folder, but {output} is a file.")

    from medvlm_harness.labelers.term_tables import term_tables
    from medvlm_harness.results.tokenizer_tables import tokenizer_markdown
    from medvlm_harness.results.tokenizers import measure_tokenizers

    named = _labelled(tokenizer)
    reports = _texts(texts, split, text_column, data_dir)
    results = measure_tokenizers(
        _loaded(named),
        reports.texts,
        reports.ids,
        term_tables(),
        notes={label: _learnt_from(name, reports) for label, name in named.items()},
        seed=seed,
    )
    results = {
        "texts": {
            "name": reports.name,
            "splits": list(reports.splits),
            "reports": len(reports.texts),
            "without_text": reports.without_text,
        },
        **results,
    }
    typer.echo(tokenizer_markdown(results))
    if output is not None:
        _write(results, output)


@app.command()
def train(
    texts: Annotated[str, typer.Option(help="A prepared set: iu_cxr or demo_cxr; its train split is read.")],
    output: Annotated[Path, typer.Option("--output", "--output-path", "--output_path", help="A new folder.")],
    vocabulary: Annotated[int, typer.Option(help="Tokens at most, the 256 bytes among them.")] = 4096,
    lowercase: Annotated[
        bool, typer.Option("--lowercase/--keep-case", help="Forget capitals, as uncased vocabularies do.")
    ] = False,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", "--min_frequency", help="How often a pair must occur to be merged.")
    ] = 2,
    data_dir: DataDir = None,
) -> None:
    """Learn a byte-level BPE vocabulary from the reports of the train split; other patients are never read."""
    from medvlm_harness.data.locate import find_dataset
    from medvlm_harness.training.data import TrainingData
    from medvlm_harness.training.vocabulary import train_vocabulary, write_vocabulary

    if texts not in DATASETS and Path(texts).exists():
        raise UserError(
            f"Expected a prepared set ({', '.join(DATASETS)}), but got {texts}: nobody can say which "
            "patients of a file are for training."
        )
    known_dataset(texts)
    data = TrainingData.of(find_dataset(texts, data_dir=data_dir))
    learnt = train_vocabulary(data, vocabulary, lowercase=lowercase, min_frequency=min_frequency)
    write_vocabulary(learnt, data, output.expanduser())
    fewer = "" if learnt.size == vocabulary else f" (of {vocabulary:,} asked for: no more pairs occur so often)"
    typer.echo(f"{learnt.size:,} tokens{fewer} from {learnt.reports:,} train reports, {learnt.characters:,} characters")
    typer.echo(f"wrote {output}")


def _labelled(given: Sequence[str]) -> dict[str, str]:
    """Label -> what is loaded; a label is the last part of a path unless one is given."""
    named: dict[str, str] = {}
    for one in given:
        label, equals, name = one.partition("=")
        if not equals:
            path = Path(one).expanduser()
            label, name = path.name if path.exists() else one, one
        if not label or not name:
            raise UserError(f"Expected --tokenizer NAME or LABEL=NAME, but got {one!r}.")
        if label in named:
            raise UserError(f"Two tokenizers are called {label!r}: name them by --tokenizer LABEL=...")
        named[label] = name
    return named


def _loaded(named: dict[str, str]) -> dict[str, ReportTokenizer]:
    from medvlm_harness.model_backends.tokenizer_files import report_tokenizer

    return {label: report_tokenizer(name) for label, name in named.items()}


def _texts(texts: str, split: str, columns: list[str] | None, data_dir: Path | None) -> _Texts:
    from medvlm_harness.data.locate import find_dataset
    from medvlm_harness.data.splits import parse_splits

    path = Path(texts).expanduser()
    splits: tuple[str, ...] = ()
    scheme = None
    if texts not in DATASETS and path.is_file():
        name, found = path.name, _lines(path) if path.suffix == ".txt" else _rows(path, columns)
        ids = [str(place) for place in range(len(found))]
    else:
        if columns:
            raise UserError("Expected --text-column with a table of reports, not with a prepared set.")
        known_dataset(texts)
        name, dataset, splits = texts, find_dataset(texts, data_dir=data_dir), parse_splits(split)
        studies = [study for study in dataset.studies if study.split in splits]
        ids = [study.study_id for study in studies]
        found = ["\n".join(filter(None, (s.findings.strip(), s.impression.strip()))) for s in studies]
        scheme = dataset.manifest.policies.get("split_scheme")
    kept = [(key, text) for key, text in zip(ids, found, strict=True) if text.strip()]
    if not kept:
        raise UserError(f"{texts} has no report with text to measure tokenizers on.")
    return _Texts(
        name,
        splits,
        None if scheme is None else str(scheme),
        tuple(key for key, _ in kept),
        tuple(text for _, text in kept),
        len(found) - len(kept),
    )


def _rows(path: Path, columns: list[str] | None) -> list[str]:
    from medvlm_harness.labelers.tables import read_reports

    return read_reports(path, columns or [])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"Expected {path.name} in UTF-8, but byte {error.start} is none: save it as UTF-8.") from error


def _learnt_from(name: str, reports: _Texts) -> list[str]:
    """A note where the vocabulary was learnt from what it is measured on, as far as a card beside it says."""
    from medvlm_harness.model_backends.cards import ModelCard, card_beside
    from medvlm_harness.tracks.contamination import trained_splits

    path = Path(name).expanduser()
    card = ModelCard(name="tokenizer", family="generative")
    entries = (card_beside(path, card) if path.exists() else card).trained_on or ()
    seen = trained_splits(entries, names=[reports.name], split_scheme=reports.split_scheme)
    both = [split for split in reports.splits if split in seen]
    return [f"learnt from the {' and '.join(both)} split, which is measured here: see --split test"] if both else []


def _write(results: dict[str, Any], output: Path) -> None:
    from medvlm_harness.results.tokenizer_tables import draw_tokenizers, tokenizer_csv, tokenizer_markdown

    output.mkdir(parents=True, exist_ok=True)
    written = {
        "tokenizers.json": json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "tokenizers.csv": tokenizer_csv(results),
        "tokenizers.md": tokenizer_markdown(results),
    }
    for name, text in written.items():
        (output / name).write_text(text, encoding="utf-8")
    beside = draw_tokenizers(results, output / "tokenizers_plot.png")
    typer.echo(f"wrote {', '.join(written)}, tokenizers_plot.png and {beside.name} into {output}")
