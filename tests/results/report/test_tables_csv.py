from __future__ import annotations

import csv
from pathlib import Path

from medvlm_harness.results.report.parts import Plot, Report, Table
from medvlm_harness.results.report.tables_csv import FileNames, write_plots, write_tables
from medvlm_harness.results.run_files import RunFiles


def test_every_table_and_every_plots_numbers_are_a_file(
    report: Report, several: dict[str, RunFiles], tmp_path: Path
) -> None:
    written = write_tables(report, tmp_path / "out")
    parts = [part for section in report.sections for part in section.parts]
    assert len(written) == sum(bool(part.rows if isinstance(part, Table) else part.data) for part in parts)
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    with (tmp_path / "out" / "accuracy_findings.csv").open(encoding="utf-8") as lines:
        rows = {row["run"]: row for row in csv.DictReader(lines)}
    own = several["reader fp32"].tasks["demo_cxr_zeroshot"]["metrics"]["auroc"]
    found = rows["reader fp32"]
    assert float(found["demo_cxr_zeroshot"]) == own["value"]
    assert [float(found[f"demo_cxr_zeroshot_{end}"]) for end in ("low", "high")] == own["ci95"]
    assert float(found["demo_cxr_zeroshot_floor"]) == own["floor"]


def test_no_cell_is_a_formula_and_no_name_leaves_the_folder(hostile: Report, tmp_path: Path) -> None:
    for path in write_tables(hostile, tmp_path / "out"):
        assert path.parent == tmp_path / "out"
        with path.open(encoding="utf-8") as lines:
            assert not any(cell.startswith(("=", "@", "+")) for row in csv.reader(lines) for cell in row)


def test_names_of_files_are_plain_and_distinct() -> None:
    names = FileNames()
    assert [names("../a b"), names("../a b"), names("A_b"), names("___A_B")] == [
        "___a_b",
        "___a_b_2",
        "A_b",
        "___A_B_3",
    ]


def test_figures_have_their_numbers_beside_them(report: Report, tmp_path: Path) -> None:
    few = [part for section in report.sections for part in section.parts if isinstance(part, Plot)][:2]
    only = Report("t", "", [], frozenset(), [], [type(report.sections[0])("s", "S", (), few)])
    written = write_plots(only, tmp_path, "svg")
    assert set(written) == {plot.name for plot in few}
    for path in written.values():
        assert path.read_text(encoding="utf-8").startswith("<?xml")
        assert path.with_suffix(".csv").stat().st_size > 0
