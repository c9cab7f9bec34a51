"""How many reports each text perturbation changes, what its guard keeps back, and whether any reads otherwise.

python benchmarks/text_perturbations.py ../shared/data/iu_cxr --reports 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from medvlm_harness.data.sources.base import ReadLog
from medvlm_harness.data.sources.detect import detect
from medvlm_harness.labelers.base import compose_report
from medvlm_harness.perturbations.text import TEXT_PERTURBATIONS, perturb_text
from medvlm_harness.perturbations.text.guard import reading


def main() -> None:
    """Print one line per perturbation and severity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder as `medvlm data prepare` reads it")
    parser.add_argument("--reports", type=int, default=1000, help="the first so many with findings and impression")
    arguments = parser.parse_args()
    log = ReadLog()
    studies = detect(arguments.source, layout=None, log=log).read(arguments.source, log).studies
    texts = [
        compose_report(study.findings, study.impression) for study in studies if study.findings and study.impression
    ]
    texts = texts[: arguments.reports]
    print(f"{len(texts)} reports")
    print(f"{'perturbation':22}{'severity':>20}{'changed':>10}{'kept back':>11}{'read otherwise':>16}")
    for perturbation in TEXT_PERTURBATIONS:
        if "report" not in perturbation.of:
            continue
        for severity, level in enumerate(perturbation.levels, start=1):
            results = [perturb_text(text, perturbation, severity) for text in texts]
            otherwise = sum(
                reading(text, perturbation.read) != reading(result.text, perturbation.read)
                for text, result in zip(texts, results, strict=True)
            )
            changed = np.mean([result.changed for result in results])
            kept_back = np.mean([result.kept_back for result in results])
            name = f"{severity} ({level})"
            print(f"{perturbation.name:22}{name:>20}{changed:10.3f}{kept_back:11.2f}{otherwise:16}", flush=True)


if __name__ == "__main__":
    main()
