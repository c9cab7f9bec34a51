"""How far the `rules` labeler and the entity extractor agree with others, and how fast they are; one command for all.

    python benchmarks/labelers.py ../shared
    python benchmarks/labelers.py ../shared --split train --errors Edema   # what to read when terms are mended

The folder holds `data/iu_cxr` (reports, MeSH codes, and `labels_and_splits.csv`, the public chexpert-labeler's output
on FINDINGS) and `labeler` (labelled sentences, annotated snippets). All of it is agreement, not accuracy: references
err as well. Terms may be mended by reading the train split only; the figures that count are those of the test split.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score

from medvlm_harness.data.chexpert import CHEXPERT_13, CHEXPERT_14
from medvlm_harness.data.labels import LabelTable, mesh_labels, read_label_table, resolve
from medvlm_harness.data.records import Labels
from medvlm_harness.data.sources.base import RawStudy, ReadLog
from medvlm_harness.data.sources.detect import detect
from medvlm_harness.data.splits import SPLITS, assign_split
from medvlm_harness.labelers.base import compose_report, make_labeler
from medvlm_harness.labelers.entities import EntityExtractor
from medvlm_harness.labelers.radgraph_json import Entities, read_radgraph
from medvlm_harness.labelers.rules import CONVENTIONS, RulesLabeler
from medvlm_harness.metrics.agreement import cohen_kappa

# As the CheXpert paper scores a labeler: one value against the rest, without the labels that cannot take it.
SCORED = {
    "positive": (1, CHEXPERT_14),
    "negative": (0, CHEXPERT_13),
    "uncertain": (-1, tuple(name for name in CHEXPERT_13 if name != "Support Devices")),
}
TIMED = 1000  # reports


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path, help="folder with data/iu_cxr and labeler")
    parser.add_argument("--split", choices=SPLITS, default="test", help="of R2Gen's studies")
    parser.add_argument("--errors", metavar="LABEL", help="list where this label disagrees instead; train split only")
    arguments = parser.parse_args()
    if arguments.errors and arguments.split != "train":
        parser.error("--errors is for the train split: terms are not mended by reading the others")
    source = arguments.shared / "data" / "iu_cxr"
    log = ReadLog()
    table = read_label_table(source / "labels_and_splits.csv", log)
    everything = detect(source, layout=None, log=log).read(source, log).studies
    studies = [study for study in everything if assign_split(study.uid, "r2gen") == arguments.split]
    if arguments.errors:
        _errors(arguments.errors, studies, table)
        return
    labeler = RulesLabeler()
    print(f"rules {labeler.version}, {arguments.split} split of R2Gen\n")
    _chexpert(studies, table)
    _mesh(studies, table, labeler)
    _sentences(arguments.shared / "labeler" / "sentences.csv", labeler)
    extractor = EntityExtractor()
    _entities(arguments.shared / "labeler" / "entities.jsonl", extractor)
    _speed([compose_report(study.findings, study.impression) for study in everything], extractor)


def _chexpert(studies: Sequence[RawStudy], table: LabelTable) -> None:
    read = [study for study in studies if study.findings and study.uid in table.labels]
    reference = [table.labels[study.uid] for study in read]
    print(f"Agreement with the public chexpert-labeler on FINDINGS, {len(read)} studies: F1 (support)")
    scores: dict[str, dict[str, list[float]]] = {}
    for convention in CONVENTIONS:
        labeler = make_labeler("rules", convention=convention)
        ours = [labeler.label(study.findings) for study in read]
        scores[convention] = {kind: _f1(reference, ours, *scored) for kind, scored in SCORED.items()}
    for kind, (value, names) in SCORED.items():
        support = [sum(labels[name] == value for labels in reference) for name in names]
        for convention in CONVENTIONS:
            *_, weighted = scores[convention][kind]
            print(f"  {kind:9}  support-weighted  {weighted:.4f} ({sum(support)})  convention={convention}")
    print(f"\n  {'label':28}{''.join(f'{kind:>28}' for kind in SCORED)}    (meaning / chexpert_labeler)")
    for name in CHEXPERT_14:
        cells = ""
        for kind, (value, names) in SCORED.items():
            if name not in names:
                cells += f"{'-':>28}"
                continue
            pair = " / ".join(f"{scores[convention][kind][names.index(name)]:.3f}" for convention in CONVENTIONS)
            cells += f"{f'{pair} ({sum(labels[name] == value for labels in reference)})':>28}"
        print(f"  {name:28}{cells}")
    print()


def _f1(reference: Sequence[Labels], ours: Sequence[Labels], value: int, names: Sequence[str]) -> list[float]:
    """F1 per label, then its mean weighted by support; NaN for a label that neither side gives this value."""
    truth, found = (
        np.array([[labels[name] == value for name in names] for labels in side]) for side in (reference, ours)
    )
    each = f1_score(truth, found, average=None, zero_division=np.nan)
    return [*map(float, each), float(f1_score(truth, found, average="weighted", zero_division=0))]


def _mesh(studies: Sequence[RawStudy], table: LabelTable, labeler: RulesLabeler) -> None:
    coded = [(study, labels) for study in studies if (labels := mesh_labels(study.mesh)) is not None]
    coded = [(study, labels) for study, labels in coded if study.findings and study.uid in table.labels]
    mesh = [labels for _, labels in coded]
    readers: dict[str, list[Labels]] = {
        "rules": [labeler.label(compose_report(study.findings, study.impression)) for study, _ in coded],
        "rules on FINDINGS": [labeler.label(study.findings) for study, _ in coded],
        "chexpert-labeler on FINDINGS": [table.labels[study.uid] for study, _ in coded],
    }
    print(f"Agreement with the coders' MeSH terms, {len(coded)} studies: F1 of positive, and Cohen's kappa")
    print("  (uncertain on either side left out, unmentioned counted as negative)")
    print(f"  {'label':28}{'MeSH +':>8}{''.join(f'{name:>32}' for name in readers)}")
    for name in CHEXPERT_14:
        cells = ""
        for found in readers.values():
            pairs = [(resolve(a, name), resolve(b, name)) for a, b in zip(mesh, found, strict=True)]
            theirs, own = zip(*(pair for pair in pairs if None not in pair), strict=True)
            f1 = float(f1_score(theirs, own, zero_division=np.nan))
            cells += f"{f'{f1:.3f}  {cohen_kappa(theirs, own):.3f}':>32}"
        print(f"  {name:28}{sum(labels[name] == 1 for labels in mesh):8}{cells}")
    print()


def _sentences(path: Path, labeler: RulesLabeler) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [row["sentence"] for row in rows if _mentioned(labeler.label(row["sentence"])) != _expected(row["labels"])]
    print(f"Labelled sentences: {len(rows) - len(wrong)} of {len(rows)} right")
    for sentence in wrong:
        print(f"  wrong: {sentence}")
    print()


def _mentioned(labels: Labels) -> dict[str, int]:
    return {name: value for name, value in labels.items() if value is not None and name != "No Finding"}


def _expected(text: str) -> dict[str, int]:
    pairs = (part.partition("=") for part in text.split(";") if part.strip())
    return {name.strip(): int(value) for name, _, value in pairs}


def _entities(path: Path, extractor: EntityExtractor) -> None:
    simple, relations = [], Counter[str]()
    same = shared = 0
    reports = read_radgraph(path)
    for report in reports.values():
        gold, found = report.annotations["entities"], extractor.extract(report.text)["entities"]
        wanted, given = ({(e["tokens"].lower(), e["label"]) for e in side.values()} for side in (gold, found))
        # RadGraph's own rule: without entities on a side the score is 0.
        simple.append(2 * len(wanted & given) / (len(wanted) + len(given)) if wanted and given else 0.0)
        theirs, ours = _statuses(gold), _statuses(found)
        shared += len(theirs.keys() & ours.keys())
        same += sum(theirs[i] == ours[i] for i in theirs.keys() & ours.keys())
        theirs_linked, ours_linked = _links(gold), _links(found)
        relations.update(both=len(theirs_linked & ours_linked), gold=len(theirs_linked), found=len(ours_linked))
    print(f"Entities by rules {extractor.version} against {len(reports)} annotated snippets")
    print("  (the rules were written with these snippets at hand: expect less on others)")
    print(f"  simple RadGraph F1 (tokens and label, mean over snippets)    {np.mean(simple):.3f}")
    print(f"  same status, of {shared} tokens that both call observation       {same / shared:.3f}")
    f1 = 2 * relations["both"] / (relations["gold"] + relations["found"])
    print(f"  relations (source, type, target; approximate), micro F1      {f1:.3f}")
    print()


def _statuses(entities: Entities) -> dict[int, str]:
    """Token -> label, of observations."""
    observed = (entity for entity in entities.values() if entity["label"].startswith("Observation"))
    return {i: entity["label"] for entity in observed for i in range(entity["start_ix"], entity["end_ix"] + 1)}


def _links(entities: Entities) -> set[tuple[int, str, int]]:
    """Relations as places in the text."""
    return {
        (entity["start_ix"], kind, entities[target]["start_ix"])
        for entity in entities.values()
        for kind, target in entity["relations"]
    }


def _speed(reports: Iterable[str], extractor: EntityExtractor) -> None:
    texts = [text for text in reports if text][:TIMED]
    start = time.perf_counter()
    labeler = RulesLabeler()
    labeler.label("The lungs are clear.")
    ready = time.perf_counter() - start
    print(f"Speed, {len(texts)} reports on one core (ready in {ready:.2f} s)")
    for what, read in (("labels", labeler.label), ("entities", extractor.extract)):
        start, busy = time.perf_counter(), time.process_time()
        for text in texts:
            read(text)
        print(f"  {what:9} {time.perf_counter() - start:.2f} s ({time.process_time() - busy:.2f} s of the processor)")


def _errors(label: str, studies: Sequence[RawStudy], table: LabelTable) -> None:
    if label not in CHEXPERT_14:
        sys.exit(f"Expected one of {', '.join(CHEXPERT_14)}, but got {label!r}.")
    labeler = RulesLabeler()
    listed: Counter[tuple[str, str]] = Counter()
    for study in studies:
        if not study.findings or study.uid not in table.labels:
            continue
        theirs, own = table.labels[study.uid][label], labeler.label(study.findings)[label]
        if theirs != own:
            listed[(f"reference {theirs}, rules {own}", study.findings)] += 1
    for (kinds, text), count in sorted(listed.items()):
        print(f"{count} x {kinds}: {text}")


if __name__ == "__main__":
    main()
