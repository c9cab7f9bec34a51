"""The card of one run in Markdown, of what everybody may see of it: facts, data, and the sections of its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from medvlm_harness.files import plain_name
from medvlm_harness.results.markdown import escape_markdown, link_text
from medvlm_harness.results.report.markdown import table_lines, with_code
from medvlm_harness.results.report.parts import Plot, Section, Table
from medvlm_harness.results.report.shown import shown
from medvlm_harness.results.run_files import RunFiles

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

__all__ = ["escaped_table", "render", "run_card"]

NONE_SAID = "not stated"


def run_card(
    run: RunFiles,
    sections: Sequence[Section],
    *,
    title: str,
    marks: Sequence[str],
    cautions: Sequence[str],
    methods: str,
    missing: Mapping[str, str],
    withheld: str,
) -> str:
    """The card; plots lie beside it, in plots/.

    Args:
        run: as `public_run` gives it.
        sections: of its report.
        title: of the page.
        marks: why it should not have been published, where it was forced.
        cautions: what a reader must know before the numbers.
        methods: how they came about, a paragraph.
        missing: what a reader may look for -> why it is not there.
        withheld: what is kept back of the data, a sentence; empty if nothing is.
    """
    return render(
        "card.md",
        title=title,
        marks=marks,
        cautions=cautions,
        facts=escaped_table(["", ""], _facts(run)),
        data=escaped_table(["Task", "Data", "Split", "Studies or images", "Labels", "Trained on it"], _data(run)),
        sections=[
            {
                "title": one.title,
                "text": [_raw(with_code(text)) for text in one.text],
                "parts": [_part(part) for part in one.parts],
            }
            for one in sections
        ],
        prompts=[(task, _quoted(prompt)) for task, prompt in _prompts(run)],
        missing=list(missing.items()),
        methods=_raw(escape_markdown(methods, longest=20_000)),
        withheld=withheld,
    )


def render(template: str, **values: Any) -> str:
    """A page; whatever stands in it is escaped, unless it was made of escaped parts."""
    return "\n".join(_template(template).render(**values).splitlines()).rstrip() + "\n"


def escaped_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, longest: int = 400) -> Markup:
    """A Markdown table of any values, each cut where it is long."""
    body = [[escape_markdown(cell, longest=longest) for cell in row] for row in rows]
    cells = [list(map(escape_markdown, header)), ["---"] * len(header), *body]
    return _raw("".join(f"| {' | '.join(row)} |\n" for row in cells))


@cache
def _template(name: str) -> Template:
    from importlib.resources import files

    from jinja2 import Environment
    from markupsafe import Markup

    # What autoescape does is for HTML alone; it passes what `finalize` has escaped for Markdown and HTML.
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else _raw(escape_markdown(value, longest=2_000)),
    )
    source = files("medvlm_harness.results.publishing").joinpath("templates", name).read_text(encoding="utf-8")
    return environment.from_string(source)


def _raw(text: str) -> Markup:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704  # made of escaped parts, all of it


def _part(part: Table | Plot) -> Markup:
    if isinstance(part, Plot):
        name, alt, title = plain_name(part.name), link_text(part.alt, longest=600), link_text(part.heading, longest=600)
        return _raw(f"![{alt}](plots/{name}.png)\n\n[{title}: the numbers](plots/{name}.csv)\n\n")
    return _raw(f"**{escape_markdown(part.heading)}**\n\n" + "\n".join(table_lines(part)) + "\n\n")


def _quoted(prompt: str) -> Markup:
    return _raw("\n".join(f"> {escape_markdown(line, longest=1_000)}  " for line in prompt.splitlines()) + "\n\n")


def _prompts(run: RunFiles) -> Iterable[tuple[str, str]]:
    return ((task, details["prompt"]) for task, details in run.tasks.items() if isinstance(details.get("prompt"), str))


def _facts(run: RunFiles) -> list[tuple[str, object]]:
    model, config = run.medvlm["model"], run.results.get("config") or {}
    card: Mapping[str, Any] = model.get("card") or {}
    source = card.get("source")
    efficiency: Mapping[str, Any] = run.medvlm.get("efficiency") or {}
    hardware: Mapping[str, Any] = efficiency.get("hardware") or {}
    versions: Mapping[str, Any] = run.medvlm.get("versions") or {}
    seconds, limit = efficiency.get("seconds"), config.get("limit")
    known: dict[str, object] = {
        "Model": card.get("name") or model.get("class"),
        "Family": card.get("family"),
        "Source": _listed(source) if isinstance(source, Mapping) else source,
        "Weights, sha256": model.get("weights_sha256"),
        "Parameters": shown(parameters).text if (parameters := card.get("parameters")) else None,
        "Licence of the model": card.get("licence"),
        "Trained on": _listed(card.get("trained_on")),
        "Precision": model.get("precision"),
        "Quantisation": _listed(model.get("quantization")) or "none",
        "Adapter": _listed(model.get("adapter")) or "none",
        "Image preprocessing": card.get("preprocessing"),
        "Prompts": model.get("prompts"),
        "Scale of probabilities": model.get("probability_scale") or card.get("probability_scale"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Seeds": ", ".join(f"{name} {value}" for name, value in config.items() if name.endswith("_seed")),
        "Hardware": _listed({key: hardware.get(key) for key in ("cpu", "cores", "gpu", "device")}),
        "Seconds": None if seconds is None else f"{seconds:.0f}",
        "Limited": "no" if limit is None else f"yes, --limit {limit:g}",
        "Date": run.date,
    }
    return [(name, value if value not in (None, "") else NONE_SAID) for name, value in known.items()]


def _listed(value: Any) -> str:
    """A short list or mapping in words; empty where there is nothing."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items() if isinstance(one, str | int | float))
    if isinstance(value, list):
        return "; ".join(_listed(one) if isinstance(one, Mapping) else str(one) for one in value)
    return "" if value is None else str(value)


def _data(run: RunFiles) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for task, details in run.tasks.items():
        dataset: Mapping[str, Any] = details["dataset"]
        contamination: Mapping[str, Any] = details.get("contamination") or {}
        seen = contamination.get("splits_seen")
        name = (
            f"{dataset.get('name')} ({dataset.get('source')}), revision {dataset.get('revision') or 'not pinned'}, "
            f"sha256 {str(dataset.get('sha256'))[:12]}, {dataset.get('licence') or 'licence not stated'}"
        )
        split = f"{details.get('split')}, by {(dataset.get('policies') or {}).get('split_scheme') or NONE_SAID}"
        labels = details.get("label_source")
        told = f"{labels}, uncertain: {details.get('uncertain', NONE_SAID)}" if labels else "none"
        trained = contamination.get("note") or ("unknown" if seen is None else ", ".join(seen) or "no")
        rows.append((task, name, split, details.get("scored", NONE_SAID), told, trained))
    return rows
