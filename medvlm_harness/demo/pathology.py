"""What disease adds to a chest phantom: one small pure function per CheXpert observation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from medvlm_harness.demo.anatomy import (
    SIDES,
    Anatomy,
    Array,
    Chest,
    Finding,
    Lung,
    band,
    ellipse,
    frontal_ribs,
    inside,
    smooth_noise,
    toward,
)

__all__ = ["DRAWN_LABELS", "alter_anatomy", "draw_finding"]

ZONES = {"upper": -0.36, "middle": -0.04, "lower": 0.24}  # y of the zone's middle
Draw = Callable[[Chest, Finding, np.random.Generator], Array]


def alter_anatomy(anatomy: Anatomy, findings: Sequence[Finding]) -> Anatomy:
    """The body with those findings that are a changed shape: a large heart, a wide mediastinum, a raised diaphragm."""
    for finding in findings:
        size = finding.size
        if finding.label == "Cardiomegaly":
            anatomy = replace(anatomy, heart=anatomy.heart * (1.04 + 0.34 * size))
        elif finding.label == "Enlarged Cardiomediastinum":
            anatomy = replace(anatomy, mediastinum=anatomy.mediastinum * (1.05 + 0.85 * size))
        elif finding.label == "Atelectasis":
            rise = 0.03 + 0.09 * size
            if finding.side in ("right", "both"):
                anatomy = replace(anatomy, diaphragm_right=anatomy.diaphragm_right - rise)
            if finding.side in ("left", "both"):
                anatomy = replace(anatomy, diaphragm_left=anatomy.diaphragm_left - rise)
    return anatomy


def draw_finding(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """The chest's density with one finding laid on; shapes changed by `alter_anatomy` are left as they are."""
    return _DRAW[finding.label](chest, finding, rng)


def _fields(chest: Chest, finding: Finding) -> list[Lung]:
    sides = list(SIDES) if finding.side in ("both", "") else [finding.side]
    return [chest.lungs[side] for side in (sides if chest.view == "frontal" else sides[:1])]


def _spot(lung: Lung, finding: Finding, rng: np.random.Generator, spread: float = 0.05) -> tuple[float, float]:
    """Where in a lung field a focal finding lies."""
    dx, dy = rng.normal(0, spread, 2).tolist()
    outwards = 0.06 if finding.site == "lower" else 0.0
    return lung.centre[0] + lung.sign * outwards + dx, ZONES.get(finding.site, 0.0) + dy


def _unchanged(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    return chest.density


def _effusion(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """Fluid that blunts the costophrenic angle and rises along the wall as a meniscus."""
    density = chest.density
    for lung in _fields(chest, finding):
        if chest.view == "frontal":
            level = 0.71 - 0.57 * finding.size - 0.20 * inside(0.12 - chest.rim, 0.05)
        else:
            level = 0.70 - 0.54 * finding.size - 0.20 * inside(chest.x - 0.35, 0.06)
        level = level + rng.normal(0, 0.02)
        fluid = inside(chest.y - level, 0.025) * lung.mask
        density = toward(density, 0.66, (0.50 + 0.35 * finding.size) * fluid)
    return density


def _pneumothorax(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """An empty dark rim outside the pleural line, widest at the apex."""
    if chest.view == "lateral":
        return chest.density
    density = chest.density
    for lung in _fields(chest, finding):
        depth = (0.05 + 0.22 * finding.size) * (0.35 + 0.65 * inside(-0.05 - chest.y, 0.2))
        empty = lung.mask * inside(depth - chest.rim, 0.008)
        collapsed = lung.mask * (1 - empty)
        density = toward(density, 0.12, 0.75 * empty)
        density = density + 0.05 * finding.size * collapsed + 0.11 * lung.mask * band(chest.rim - depth, 0.012)
    return density


def _lung_opacity(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """A soft patch without an edge."""
    density = chest.density
    for lung in _fields(chest, finding):
        radius = 0.13 + 0.12 * finding.size
        patch = np.exp(-((np.hypot(*_offset(chest, _spot(lung, finding, rng))) / radius) ** 2))
        density = density + (0.11 + 0.13 * finding.size) * patch * lung.mask
    return density


def _consolidation(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """A dense patch with an uneven edge that hides the vessels."""
    density = chest.density
    for lung in _fields(chest, finding):
        radius = 0.13 + 0.14 * finding.size
        distance = ellipse(chest.x, chest.y, _spot(lung, finding, rng), (radius, 0.8 * radius), rng.uniform(-0.6, 0.6))
        patch = inside(distance + 0.03 * smooth_noise(rng, 14), 0.02)
        density = toward(density, 0.62, (0.38 + 0.45 * finding.size) * patch * lung.mask)
    return density


def _pneumonia(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """Patchy, mottled shadows in one zone."""
    density = chest.density
    for lung in _fields(chest, finding):
        reach = np.exp(-((np.hypot(*_offset(chest, _spot(lung, finding, rng))) / (0.18 + 0.14 * finding.size)) ** 2))
        mottle = inside(smooth_noise(rng, 20) - 0.1, 0.3)
        density = density + (0.20 + 0.18 * finding.size) * reach * mottle * lung.mask
    return density


def _atelectasis(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """Plate-like bands above a raised diaphragm."""
    density = chest.density
    for lung in _fields(chest, finding):
        for k in range(1 + int(finding.size > 0.4)):
            slope, gap = rng.normal(0.0, 0.25), 0.12 + 0.11 * k + abs(rng.normal(0, 0.03))
            dx = chest.x - lung.centre[0]
            line = band(chest.y - (float(lung.floor.min()) - gap + slope * dx), 0.018 + 0.012 * finding.size)
            density = density + (0.16 + 0.14 * finding.size) * line * inside(0.20 - np.abs(dx), 0.03) * lung.mask
    return density


def _edema(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """Haze on both sides around the hila, with thickened lines out to the wall."""
    density = chest.density
    for lung in {id(lung): lung for lung in chest.lungs.values()}.values():
        centre = (lung.sign * 0.24, 0.04) if chest.view == "frontal" else (0.04, -0.02)
        haze = np.exp(-((np.hypot(*_offset(chest, centre)) / (0.26 + 0.12 * finding.size)) ** 2))
        lines = inside(smooth_noise(rng, 30) - 0.6, 0.25)
        density = density + lung.mask * ((0.02 + 0.20 * finding.size) * haze + (0.01 + 0.08 * finding.size) * lines)
    return density


def _lung_lesion(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """A round nodule or mass with a clear edge."""
    density = chest.density
    for lung in _fields(chest, finding):
        radius = 0.045 + 0.075 * finding.size
        spot = ellipse(chest.x, chest.y, _spot(lung, finding, rng, 0.06), (radius, radius * rng.uniform(0.85, 1.0)))
        density = toward(density, 0.60, (0.65 + 0.2 * finding.size) * inside(spot, 0.01) * inside(chest.rim, 0.02))
    return density


def _pleural_other(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """Thickened pleura along the wall, in part calcified."""
    density = chest.density
    for lung in _fields(chest, finding):
        depth = (0.045 + 0.06 * finding.size) * (1 + 0.25 * smooth_noise(rng, 10))
        extent = band(chest.y - ZONES.get(finding.site, 0.0), 0.22 + 0.15 * finding.size)
        thick = lung.mask * inside(depth - chest.rim, 0.012) * extent
        border = band(chest.rim - depth, 0.014) * lung.mask * extent
        density = density + (0.26 + 0.18 * finding.size) * thick + (0.10 + 0.22 * finding.size) * border
    return density


def _fracture(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """A step in one rib's line, with a dark gap and some callus."""
    if chest.view == "lateral":
        return chest.density
    density = chest.density
    for lung in _fields(chest, finding):
        u = lung.sign * chest.x
        height = ZONES.get(finding.site, 0.0) + rng.normal(0, 0.03)
        break_at = 0.53 + rng.normal(0, 0.02)
        window = inside(u - break_at, 0.008) * band(chest.y - height, 0.12) * inside(break_at + 0.18 - u, 0.02)
        step = (0.05 + 0.04 * finding.size) * window
        anatomy, contrast = chest.anatomy, chest.anatomy.rib_contrast + 0.04
        moved = frontal_ribs(anatomy, chest.x, chest.y - step, chest.rim)
        density = density + contrast * (moved - frontal_ribs(anatomy, chest.x, chest.y, chest.rim))
        near = band(chest.y - height, 0.10)
        density = density - (0.10 + 0.08 * finding.size) * near * band(u - break_at, 0.014)
        callus = inside(ellipse(u, chest.y, (break_at + 0.03, height), (0.07, 0.05)), 0.02)
        density = density + (0.08 + 0.18 * finding.size) * callus
    return density


def _support_devices(chest: Chest, finding: Finding, rng: np.random.Generator) -> Array:
    """A pacemaker with its lead, a central venous line, or a tracheal tube with a gastric tube."""
    sign = SIDES.get(finding.side, -1)
    x, y = chest.x, chest.y
    if chest.view == "lateral":
        course = band(x - 0.06 + 0.22 * inside(y - 0.0, 0.12), 0.012) * inside(0.25 - y, 0.02) * inside(y + 0.7, 0.02)
        box = inside(ellipse(x, y, (-0.52, -0.48), (0.05, 0.12)), 0.008)
        return chest.density + 0.20 * course + (0.45 * box if finding.site == "pacemaker" else 0)
    if finding.site == "tube":
        tube = band(x - 0.01, 0.022) * inside(-0.28 + rng.normal(0, 0.04) - y, 0.01)
        gastric = band(x - 0.045 - 0.25 * np.clip(y - 0.35, 0, None), 0.014)
        return chest.density + (0.08 + 0.16 * finding.size) * tube + (0.05 + 0.13 * finding.size) * gastric
    # Both lines come from the arm's side and run down along the caval vein, at the patient's right.
    entry, u = -0.50 + rng.normal(0, 0.03), sign * x
    inward = band(y - entry + 0.22 * np.sin(3.2 * np.clip(u, -0.1, 0.6)) * (u - 0.5) * 0.6, 0.014)
    inward = inward * inside(u + 0.08 * sign, 0.01) * inside(0.52 - u, 0.01)
    tip = 0.36 if finding.site == "pacemaker" else 0.05
    drift = 0.30 * np.clip(y - 0.10, 0, None) if finding.site == "pacemaker" else 0
    downward = band(x + 0.08 - drift, 0.013) * inside(y - entry, 0.01) * inside(tip - y, 0.01)
    density: Array = chest.density + (0.07 + 0.19 * finding.size) * np.maximum(inward, downward)
    if finding.site == "pacemaker":
        box = inside(ellipse(x, y, (sign * 0.52, entry + 0.04), (0.10 + 0.03 * finding.size, 0.075)), 0.008)
        density = toward(density, 0.92, (0.6 + 0.25 * finding.size) * box)
    return density


def _offset(chest: Chest, centre: tuple[float, float]) -> tuple[Array, Array]:
    return chest.x - centre[0], chest.y - centre[1]


_DRAW: dict[str, Draw] = {
    "Enlarged Cardiomediastinum": _unchanged,
    "Cardiomegaly": _unchanged,
    "Lung Lesion": _lung_lesion,
    "Lung Opacity": _lung_opacity,
    "Edema": _edema,
    "Consolidation": _consolidation,
    "Pneumonia": _pneumonia,
    "Atelectasis": _atelectasis,
    "Pneumothorax": _pneumothorax,
    "Pleural Effusion": _effusion,
    "Pleural Other": _pleural_other,
    "Fracture": _fracture,
    "Support Devices": _support_devices,
}
DRAWN_LABELS = tuple(_DRAW)
