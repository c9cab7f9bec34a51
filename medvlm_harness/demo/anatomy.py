"""Normal anatomy of a chest phantom, drawn from analytic shapes with smooth edges.

Coordinates are those of the body: x and y from -1 to 1, y downwards. In the frontal view the patient's right is at the
image's left, as on a film; in the lateral view the front of the chest is at the left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "SIDES",
    "Anatomy",
    "Array",
    "Chest",
    "Finding",
    "Lung",
    "View",
    "band",
    "draw_chest",
    "ellipse",
    "frontal_ribs",
    "inside",
    "sample_anatomy",
    "smooth_noise",
    "toward",
]

SIZE = 160  # pixels per side
SIDES = {"right": -1, "left": 1}  # the patient's side -> sign of x in the frontal view

Array = NDArray[np.floating[Any]]  # float32 where drawn: half the time of float64, and far finer than 8 bits
View = Literal["frontal", "lateral"]
AIR, TISSUE, HEART = 0.03, 0.56, 0.70  # brightness before exposure; air is black, bone white


@dataclass(frozen=True, slots=True)
class Finding:
    """One abnormality as drawn and told."""

    label: str  # CheXpert's name
    side: str = ""  # the patient's "left" or "right", "both", or "" where side has no meaning
    size: float = 0.5  # in (0, 1]: barely visible to gross
    site: str = ""  # "upper", "middle" or "lower" zone; for devices, which one


@dataclass(frozen=True, slots=True)
class Anatomy:
    """One body: what stays the same in all images of a patient."""

    width: float = 1.0  # scale of the body
    height: float = 1.0
    heart: float = 1.0  # scale of the heart
    heart_shift: float = 0.0
    mediastinum: float = 0.10  # half width at the top
    diaphragm_right: float = 0.42  # y of the dome's top
    diaphragm_left: float = 0.47
    rib_spacing: float = 0.17
    rib_contrast: float = 0.07
    breast: float = 0.0
    stomach_bubble: float = 0.0
    fat: float = 0.0


@dataclass(frozen=True, slots=True)
class Lung:
    """One lung field; in the lateral view both lie over each other and only one is drawn."""

    sign: int  # -1 the patient's right, 1 left, in frontal coordinates
    mask: Array  # in [0, 1]
    floor: Array  # y of the diaphragm under each pixel
    centre: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Chest:
    """A drawn chest with the geometry that the findings are laid on."""

    view: View
    anatomy: Anatomy
    x: Array
    y: Array
    rim: Array  # signed distance to the inside of the rib cage, positive inside
    lungs: dict[str, Lung]  # by side; the lateral view has the same one under both names
    density: Array  # in about [0, 1]


def inside(distance: Array, softness: float = 0.012) -> Array:
    """A smooth mask: 1 where the signed distance is positive, 0 where negative."""
    mask: Array = 1 / (1 + np.exp(np.clip(distance * (-1 / softness), -40, 40)))
    return mask


def ellipse(x: Array, y: Array, centre: tuple[float, float], radii: tuple[float, float], tilt: float = 0.0) -> Array:
    """Approximate signed distance to an ellipse, positive inside."""
    dx, dy = x - centre[0], y - centre[1]
    cos, sin = math.cos(tilt), math.sin(tilt)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    return (1 - np.hypot(u / radii[0], v / radii[1])) * min(radii)


def band(distance: Array, half_width: float) -> Array:
    """A line or tube around distance 0, brightest in the middle."""
    line: Array = np.exp(-((distance / half_width) ** 2))
    return line


def toward(density: Array, value: float, weight: Array) -> Array:
    """Move the density to a value where the weight is 1."""
    return density + (value - density) * weight


def smooth_noise(rng: np.random.Generator, cells: int) -> Array:
    """A random field of about unit spread with `cells` bumps along each side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)


def sample_anatomy(rng: np.random.Generator, sex: str = "M") -> Anatomy:
    """A random body; women are a little smaller and have breast shadows."""
    female = sex == "F"
    right = float(rng.uniform(0.34, 0.50))
    return Anatomy(
        width=float(rng.normal(0.97 if female else 1.02, 0.05)),
        height=float(rng.normal(0.98 if female else 1.02, 0.04)),
        heart=float(np.clip(rng.normal(0.99, 0.08), 0.82, 1.17)),
        heart_shift=float(rng.normal(0, 0.015)),
        mediastinum=float(np.clip(rng.normal(0.107, 0.016), 0.08, 0.145)),
        diaphragm_right=right,
        diaphragm_left=right + float(rng.uniform(0.0, 0.09)),
        rib_spacing=float(rng.uniform(0.155, 0.19)),
        rib_contrast=float(rng.uniform(0.04, 0.09)),
        breast=float(rng.uniform(0.04, 0.10)) if female else 0.0,
        stomach_bubble=float(rng.uniform(0.05, 0.2)) if rng.random() < 0.5 else 0.0,
        fat=float(rng.uniform(0, 0.07)),
    )


def draw_chest(anatomy: Anatomy, view: View, pose_rng: np.random.Generator, texture_rng: np.random.Generator) -> Chest:
    """Draw a body without disease, posed at random."""
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    tilt, dx, dy, scale = pose_rng.normal((0, 0, 0, 1), (0.035, 0.035, 0.03, 0.02)).tolist()
    cos, sin = math.cos(tilt), math.sin(tilt)
    x, y = (x - dx) * cos + (y - dy) * sin, (y - dy) * cos - (x - dx) * sin
    x, y = x / (anatomy.width * scale), y / (anatomy.height * scale)
    draw = _frontal if view == "frontal" else _lateral
    return draw(anatomy, x, y, texture_rng)


def _frontal(anatomy: Anatomy, x: Array, y: Array, rng: np.random.Generator) -> Chest:
    side = np.abs(x)
    rim = ellipse(x, y, (0, 0.18), (0.74, 0.96))
    shoulders = inside(y + 0.86 - 0.42 * np.maximum(side - 0.16, 0), 0.02) * inside(1.0 - 0.18 * (y + 0.3) - side, 0.03)
    body = np.maximum(shoulders, inside(0.19 + 0.1 * (y + 0.8) - side, 0.02) * (y < 0))
    lungs = {}
    for name, sign in SIDES.items():
        u = sign * x
        top = anatomy.diaphragm_right if sign < 0 else anatomy.diaphragm_left
        floor = top + np.where(u > 0.34, 1.9 * (u - 0.34) ** 2, 0.8 * (u - 0.34) ** 2)
        hilum = 0.05 * band(y - 0.0, 0.25)
        mask = inside(rim - 0.01) * inside(u - anatomy.mediastinum - hilum, 0.02) * inside(floor - y)
        lungs[name] = Lung(sign, mask, floor, (sign * 0.40, -0.08))
    right, left = lungs["right"], lungs["left"]
    air = right.mask + left.mask
    density: Array = AIR + (TISSUE + anatomy.fat - AIR) * body
    below = inside(y - np.where(x < 0, right.floor, left.floor), 0.02) * body
    density = density + 0.09 * below * inside(rim + 0.03, 0.03)
    density = density - 0.22 * anatomy.stomach_bubble * 5 * inside(ellipse(x, y, (0.36, 0.66), (0.16, 0.1)), 0.03)
    density = density - (0.38 - 0.05 * (y + 0.5) ** 2) * air
    for name, lung in lungs.items():
        density = density + 0.11 * lung.mask * _vessels(x, y, (lung.sign * 0.15, -0.02), rng)
        hilum_centre = (lung.sign * 0.16, 0.0 if name == "right" else -0.05)
        density = density + 0.10 * inside(ellipse(x, y, hilum_centre, (0.07, 0.13)), 0.035)
    # Middle of the chest: spine, vessels of the upper mediastinum, aortic knob, heart.
    density = density + 0.06 * inside(0.075 - side, 0.01) * (0.75 + 0.25 * np.cos(y * 42)) * body
    density = toward(density, HEART - 0.05, 0.8 * inside(anatomy.mediastinum - side, 0.02) * inside(y + 0.75, 0.1))
    knob = ellipse(x, y, (anatomy.mediastinum, -0.26), (0.085, 0.10))
    density = toward(density, HEART - 0.03, 0.8 * inside(knob, 0.015))
    size = anatomy.heart
    centre = (0.10 + 0.05 * (size - 1) + anatomy.heart_shift, 0.27)
    heart = np.maximum(
        inside(ellipse(x, y, centre, (0.31 * size, 0.235 * size), 0.55), 0.015),
        inside(ellipse(x, y, (-0.05, 0.22), (0.135 * size, 0.22)), 0.015),
    )
    density = toward(density, HEART, 0.88 * heart)
    trachea = band(x + 0.01, 0.04) * inside(-0.22 - y, 0.04)
    density = density - 0.12 * trachea * body
    density = density + anatomy.rib_contrast * frontal_ribs(anatomy, x, y, rim)
    for sign in (-1, 1):
        u = sign * x
        collar = inside(0.030 - np.abs(y + 0.58 + 0.24 * u - 0.03 * np.sin(9 * u)), 0.008)
        density = density + 0.12 * collar * inside(u - 0.07, 0.02) * inside(0.74 - u, 0.02) * body
        density = density + anatomy.breast * inside(ellipse(x, y, (sign * 0.42, 0.40), (0.34, 0.30)), 0.03)
    return Chest("frontal", anatomy, x, y, rim, lungs, density)


def frontal_ribs(anatomy: Anatomy, x: Array, y: Array, rim: Array) -> Array:
    """Posterior ribs falling outwards and fainter anterior ones rising outwards, as a brightness in about [0, 1]."""
    u = np.abs(x)
    cage = inside(rim + 0.035, 0.015) * inside(u - 0.06, 0.02) * inside(0.75 - y, 0.08)
    back = _pulses((y + 0.10 * u - 0.60 * u**2) / anatomy.rib_spacing)
    front = _pulses((y + 0.75 * u - 0.25 * u**2) / (1.35 * anatomy.rib_spacing) + 0.3)
    return cage * (back + 0.5 * front * inside(u - 0.30, 0.05))


def _pulses(phase: Array) -> Array:
    """Equal bars of a periodic pattern, with the bright borders of cortical bone."""
    bar = inside(np.cos(2 * np.pi * phase) - 0.15, 0.12)
    return 0.75 * bar + 1.2 * bar * (1 - bar)


def _vessels(x: Array, y: Array, hilum: tuple[float, float], rng: np.random.Generator) -> Array:
    """Branches that run outwards from the hilum and fade, as a brightness in about [0, 1]."""
    dx, dy = x - hilum[0], y - hilum[1]
    radius = np.hypot(dx, dy)
    angle = np.arctan2(dy, dx) + 0.25 * np.sin(6 * radius + rng.uniform(0, 6)) * np.minimum(radius, 0.5)
    spokes = np.clip(rng.standard_normal(48), 0, 2.0)
    spokes[-1] = spokes[0]
    lit = np.interp(angle, np.linspace(-np.pi, np.pi, spokes.size), spokes).astype(np.float32)
    branches: Array = lit * np.exp(-5.3 * radius**1.5)
    return branches


def _lateral(anatomy: Anatomy, x: Array, y: Array, rng: np.random.Generator) -> Chest:
    body = inside(ellipse(x, y, (0.0, 0.35), (0.76, 1.45)), 0.02)
    neck = inside(0.24 - np.abs(x - 0.10), 0.02) * (y < 0)
    body = np.maximum(body * inside(y + 0.90, 0.05), neck)
    rim = ellipse(x, y, (-0.02, 0.0), (0.60, 0.86), -0.08)
    floor = anatomy.diaphragm_right + 0.02 + 0.28 * x + 0.55 * (x + 0.05) ** 2
    mask = inside(rim) * inside(floor - y)
    lung = Lung(1, mask, floor, (0.08, -0.08))
    density: Array = AIR + (TISSUE + anatomy.fat - AIR) * body - 0.34 * mask
    density = density + 0.10 * inside(y - floor, 0.02) * body
    density = density + 0.09 * mask * _vessels(x, y, (0.02, -0.08), rng)
    density = density + 0.12 * inside(ellipse(x, y, (0.02, -0.08), (0.10, 0.13)), 0.04)
    second_dome = floor + (anatomy.diaphragm_left - anatomy.diaphragm_right) - 0.05
    density = density + 0.05 * inside(y - second_dome, 0.012) * mask
    spine_x = 0.46 - 0.10 * (y - 0.05) ** 2
    spine = inside(0.105 - np.abs(x - spine_x), 0.012) * body
    density = density + spine * (0.17 + 0.05 * np.cos(y * 36)) * (1 - 0.25 * y)
    size = anatomy.heart
    heart = inside(ellipse(x, y, (-0.25 + 0.16 * (size - 1), 0.24), (0.33 * size, 0.25 * size), 0.75), 0.03)
    density = toward(density, HEART - 0.10, 0.72 * heart * inside(rim + 0.02, 0.03))
    great_vessels = inside(1.6 * anatomy.mediastinum - np.abs(x + 0.02 + 0.1 * y), 0.05) * inside(-0.08 - y, 0.08)
    density = density + 0.10 * great_vessels * body
    density = density - 0.12 * band(x - 0.06 - 0.12 * (y + 0.6), 0.04) * inside(-0.15 - y, 0.05) * body
    sternum = inside(0.03 - np.abs(x + 0.58 + 0.12 * (y + 0.2)), 0.008) * inside(0.35 - np.abs(y + 0.20), 0.03)
    density = density + 0.13 * sternum
    ribs = _pulses((y - 0.45 * x + 0.25 * x**2) / (1.1 * anatomy.rib_spacing))
    density = density + 0.45 * anatomy.rib_contrast * ribs * inside(rim + 0.03, 0.02) * inside(0.6 - y, 0.08)
    density = density + 0.8 * anatomy.breast * inside(ellipse(x, y, (-0.62, 0.30), (0.26, 0.24)), 0.03)
    return Chest("lateral", anatomy, x, y, rim, {"right": lung, "left": lung}, density)
