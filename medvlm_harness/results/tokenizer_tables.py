"""What tokenizers make of reports, as tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm_harness.results.markdown import markdown_table
from medvlm_harness.results.plots import house_style, new_figure, plot_data, save_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_tokenizers", "tokenizer_csv", "tokenizer_markdown", "tokenizer_rows"]

HEADER = ("tokenizer", "metric", "value", "low", "high", "n", "first_minus_this", "difference_low", "difference_high")
WORDS = (
    "A word is a run of letters and digits with the marks inside it (x-ray, 3.5); XXXX, which stands for what was "
    "taken out of a report, is a word like others. Lengths count special tokens, all else leaves them out."
)
SHARES = ("truncated_", "unknown_", "continued_")


def tokenizer_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each tokenizer and metric, as `tokenizers.json` has them; None where there is nothing to state."""
    rows = []
    for name, one in results["tokenizers"].items():
        for metric, estimate in one["metrics"].items():
            difference = one["first_minus_this"].get(metric, {})
            values = (
                name,
                metric,
                estimate["value"],
                *(estimate["ci95"] or (None, None)),
                estimate["n"],
                difference.get("value"),
                *(difference.get("ci95") or (None, None)),
            )
            rows.append(dict(zip(HEADER, values, strict=True)))
    return rows


def tokenizer_csv(results: Mapping[str, Any]) -> str:
    """The rows as CSV, empty where there is nothing to state."""
    return plot_data(tokenizer_rows(results))


def tokenizer_markdown(results: Mapping[str, Any]) -> str:
    """Four tables: the reports, the differences, the terms, and what is cut most."""
    tokenizers = results["tokenizers"]
    names, first = list(tokenizers), next(iter(tokenizers))
    metrics = [metric for metric in tokenizers[first]["metrics"] if not _of_table(metric, results)]
    texts = results["texts"]
    lines = [
        f"# Tokenizers on {texts['name']}",
        "",
        f"{texts['reports']:,} reports{_splits(texts)}; {texts['without_text']:,} without text are left out. Brackets "
        f"hold 95% intervals, from a bootstrap over studies. {WORDS}",
        "",
    ]

    def table(rows: Sequence[tuple[str, ...]], of: Sequence[str] = names) -> list[str]:
        return markdown_table([("", *of), *rows])

    lines += table(
        [
            ("vocabulary", *(f"{tokenizers[name]['vocabulary']:,}" for name in names)),
            ("special tokens of a text", *(str(tokenizers[name]["special_tokens"]) for name in names)),
            *((_title(m), *(_shown(tokenizers[name]["metrics"][m], m) for name in names)) for m in metrics),
            ("XXXX becomes", *(f"`{' '.join(tokenizers[name]['removed']['pieces'])}`" for name in names)),
            ("share of tokens for XXXX", *(_percent(tokenizers[name]["removed"]["share"]) for name in names)),
        ]
    )
    notes = [f"- {name}: {note}" for name in names for note in tokenizers[name]["notes"]]
    lines += ["", *notes] if notes else []
    if len(names) > 1:
        lines += ["", f"## {first} less the others", ""]
        lines += table(
            [(_title(m), *(_shown(tokenizers[name]["first_minus_this"][m], m) for name in names[1:])) for m in metrics],
            names[1:],
        )
    lines += ["", "## Medical terms", ""]
    lines += ["A term is whole where no word of it is cut; one piece per word is the least.", ""]
    rows = []
    for name_of_table, terms in results["term_tables"].items():
        listed = [tokenizers[name]["term_lists"][name_of_table] for name in names]
        found = [tokenizers[name]["metrics"] for name in names]
        whole, pieces = f"{name_of_table}_whole", f"{name_of_table}_pieces"
        head = f"{name_of_table}, {terms} terms: "
        rows += [
            (f"{head}whole, in reports", *(_shown(one[whole], whole) for one in found)),
            (f"{head}pieces per word, in reports", *(_shown(one[pieces], pieces) for one in found)),
            (f"{head}whole, in the list", *(_percent(one["whole"]) for one in listed)),
            (f"{head}pieces per term, in the list", *(f"{one['pieces_per_term']:.2f}" for one in listed)),
        ]
    lines += table(rows)
    for name in names:
        cut = [
            (one["term"], f"{one['occurrences']:,}", f"{one['pieces']:.2f}", f"`{' '.join(one['as'])}`")
            for one in tokenizers[name]["most_cut"]
        ]
        if cut:
            lines += ["", f"## What {name} cuts most", ""]
            lines += markdown_table([("term", "occurrences", "pieces", "alone"), *cut])
    return "\n".join(lines) + "\n"


def draw_tokenizers(results: Mapping[str, Any], path: Path) -> Path:
    """Fertility, length and terms of each tokenizer, with intervals; the numbers are written beside it.

    Args:
        results: as `tokenizers.json` has them.
        path: ends in .png or .svg.

    Returns:
        The path of the CSV.
    """
    tokenizers = results["tokenizers"]
    names, tables = list(tokenizers), list(results["term_tables"])
    figure, (left, middle, right) = new_figure(columns=3, size=(4.4, 1.6 + 0.5 * max(len(names), len(tables))))
    data: list[dict[str, object]] = []

    def bars(axes: Axes, metrics: Sequence[str], labels: Sequence[str]) -> None:
        height = 0.8 / len(names)
        for place, name in enumerate(names):
            found = [tokenizers[name]["metrics"][metric] for metric in metrics]
            values = [one["value"] or 0.0 for one in found]
            ends = [one["ci95"] or (value, value) for one, value in zip(found, values, strict=True)]
            reach = [
                [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
                [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
            ]
            at = [row + (place - (len(names) - 1) / 2) * height for row in range(len(metrics))]
            axes.barh(at, values, height * 0.9, xerr=reach, label=name, error_kw={"elinewidth": 0.8})
            data.extend(
                {"tokenizer": name, "metric": metric, "value": one["value"], "low": low, "high": high}
                for metric, one, (low, high) in zip(metrics, found, ends, strict=True)
            )
        axes.set_yticks(range(len(metrics)), labels)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)

    with house_style():
        bars(left, ["fertility", "characters_per_token"], ["tokens\nper word", "characters\nper token"])
        left.set_title("Fertility and characters")
        limits = [metric for metric in tokenizers[names[0]]["metrics"] if metric.startswith("truncated_")]
        bars(middle, limits, [f"{metric.removeprefix('truncated_')} tokens" for metric in limits])
        middle.set_title("Share of reports cut at a length")
        bars(right, [f"{table}_whole" for table in tables], tables)
        right.set_title("Share of terms in reports kept whole")
        right.set_xlim(0, 1)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 4))
    return save_plot(figure, path, data=data)


def _of_table(metric: str, results: Mapping[str, Any]) -> bool:
    return metric.rpartition("_")[0] in results["term_tables"]


def _title(metric: str) -> str:
    titles = {"fertility": "tokens per word (fertility)", "tokens_mean": "tokens per report, mean"}
    titles |= {"tokens_median": "tokens per report, median", "tokens_p95": "tokens per report, 95th percentile"}
    titles |= {"unknown_tokens": "tokens that are unknown", "unknown_words": "words with an unknown token"}
    titles |= {"continued_words": "words of two tokens or more", "characters_per_token": "characters per token"}
    if metric.startswith("truncated_"):
        return f"reports longer than {metric.removeprefix('truncated_')} tokens"
    return titles[metric]


def _shown(estimate: Mapping[str, Any], metric: str) -> str:
    """A value with its interval; a share as a percentage."""
    share = metric.startswith(SHARES) or metric.endswith("_whole")
    digits = 1 if metric.startswith("tokens_") else 2
    ends = estimate["ci95"]
    if estimate["value"] is None:
        return "n/a"
    form = _percent if share else lambda value: f"{value:.{digits}f}"
    return form(estimate["value"]) + (f" [{form(ends[0])}, {form(ends[1])}]" if ends else "")


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}%"


def _splits(texts: Mapping[str, Any]) -> str:
    return f" of {'+'.join(texts['splits'])}" if texts["splits"] else ""
