"""`medvlm perturb`: the contact sheet of one image under the corruptions of its modality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvlm_harness.errors import UserError

__all__ = ["app"]

app = typer.Typer()


@app.command()
def perturb(
    image: Annotated[Path, typer.Argument(help="Image to corrupt: PNG or JPEG.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Sheet to write: a .png that is not there yet.")],
    modality: Annotated[str, typer.Option(help="chest, ct, fundus, oct or mri.")] = "chest",
    severity: Annotated[str, typer.Option(help="Severities to draw, 1 to 5, with commas.")] = "1,2,3,4,5",
    seed: Annotated[int, typer.Option(help="Seed of what is drawn at random.")] = 0,
) -> None:
    """Draw a sheet of one image under each corruption and severity, to look at before believing their figures."""
    severities = _severities(severity)
    if out.suffix.lower() != ".png":
        raise UserError(f"Expected a sheet named *.png, got {out}.")
    if out.exists():
        raise UserError(f"{out} is there already: give another name.")
    if not out.parent.is_dir():
        raise UserError(f"Folder {out.parent} of the sheet does not exist: make it first.")

    from medvlm_harness.data.images import inspect_image, open_image
    from medvlm_harness.perturbations.image import corruptions_of
    from medvlm_harness.perturbations.image.sheet import contact_sheet

    corruptions = corruptions_of(modality)
    key = inspect_image(image).sha256
    sheet = contact_sheet(open_image(image, expected_sha256=key), corruptions, severities, key=key, seed=seed)
    with out.open("xb") as file:
        sheet.save(file, "PNG")
    typer.echo(f"wrote {out}: {len(corruptions)} corruptions of {image.name}, {modality}, seed {seed}")


def _severities(text: str) -> tuple[int, ...]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry in {"1", "2", "3", "4", "5"} for entry in entries):
        raise UserError(f"Expected severities from 1 to 5 with commas, as in --severity 1,3,5; got {text!r}.")
    return tuple(sorted({int(entry) for entry in entries}))
