"""`medvlm perturb`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medvlm_harness.perturbations.image import base, corruptions_of


@pytest.fixture
def image(tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    return write_image(tmp_path / "chest.png", size=(64, 48))


def test_a_sheet_is_drawn_the_same_each_time(medvlm: Callable[..., Any], image: Path) -> None:
    first, second, other = (image.with_name(name) for name in ("a.png", "b.png", "c.png"))
    status, printed, err = medvlm("perturb", image, "-o", first, "--severity", "1,5")
    assert (status, err) == (0, "")
    assert printed == f"wrote {first}: {len(corruptions_of('chest'))} corruptions of chest.png, chest, seed 0\n"
    assert medvlm("perturb", image, "-o", second, "--severity", "5, 1").status == 0
    assert medvlm("perturb", image, "-o", other, "--severity", "1,5", "--seed", "1").status == 0
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    with Image.open(first) as sheet:
        assert sheet.width < sheet.height


def test_another_modality_has_its_own_rows(medvlm: Callable[..., Any], image: Path) -> None:
    out = image.with_name("oct.png")
    assert "6 corruptions of chest.png, oct" in medvlm("perturb", image, "-o", out, "--modality", "oct").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--severity", "1,6"), "Expected severities from 1 to 5 with commas, as in --severity 1,3,5; got '1,6'."),
        (("--severity", ""), "Expected severities from 1 to 5"),
        (("--modality", "fundos"), "Unknown modality 'fundos'. Did you mean fundus"),
    ],
)
def test_wrong_options_are_one_line(
    medvlm: Callable[..., Any], image: Path, options: tuple[str, ...], message: str
) -> None:
    out = image.with_name("sheet.png")
    status, printed, err = medvlm("perturb", image, "-o", out, *options)
    assert (status, printed, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")
    assert not out.exists()


def test_files_that_will_not_do(medvlm: Callable[..., Any], image: Path) -> None:
    before = image.read_bytes()
    there = medvlm("perturb", image, "-o", image)
    assert (there.status, there.err) == (2, f"error: {image} is there already: give another name.\n")
    assert image.read_bytes() == before
    assert "named *.png" in medvlm("perturb", image, "-o", image.with_suffix(".jpg")).err
    assert "does not exist" in medvlm("perturb", image, "-o", image.parent / "none" / "a.png").err
    missing = medvlm("perturb", image.with_name("no.png"), "-o", image.with_name("a.png"))
    assert (missing.status, "no.png cannot be read" in missing.err) == (2, True)


def test_mri_without_its_extra_names_it(
    medvlm: Callable[..., Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base.EXTRAS, "mri", "no-such-library")
    out = image.with_name("mri.png")
    status, _, err = medvlm("perturb", image, "-o", out, "--modality", "mri")
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install 'medvlm-harness[mri]'" in err
    assert not out.exists()
