"""Image corruptions: their tables, their determinism, their strength, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter, uniform_filter

from medvlm_harness.demo.generate import DEMO_SEED, generate_cases
from medvlm_harness.errors import UserError
from medvlm_harness.perturbations.image import (
    CORRUPTIONS,
    MODALITIES,
    Corruption,
    base,
    corrupt,
    corruptions_of,
    find_corruption,
    find_suite,
    identity,
)
from medvlm_harness.perturbations.image.base import TUNED_SIZE
from medvlm_harness.perturbations.image.sheet import CELL, contact_sheet

PAGE = Path(__file__).resolve().parents[2] / "docs" / "perturbations.md"
WITHOUT_EXTRA = [corruption for corruption in CORRUPTIONS if not corruption.extra]
EVERY_CASE = [(corruption, severity) for corruption in WITHOUT_EXTRA for severity in corruption.severities]
# The published trails of severities 1 and 2 are one Gaussian, cut at 3.4 and at 6 sigma; so only the ends are ordered.
ONLY_ENDS_ORDERED = {("fundus", "motion_blur")}
RANDOM = {"gaussian_noise", "speckle_noise", "impulse_noise", "shot_noise", "motion_blur", "tilt", "rotation"}
RANDOM |= {"window_level", "burned_in_marker"}
# sha256 of the pixels of `picture()` corrupted: integer arithmetic of Pillow and tables, no libjpeg, no FreeType.
GOLDEN = {
    "pixelate@1": "970fce9579d18a6b1e8f0ef0e1024aa82e50da2076c38d8eaa3f8c24df5fe836",
    "pixelate@5": "e0f9356d345267c1a8aad20ec7a282fa82ec3d95de8810729a7662caf6424d24",
    "brightness_up@1": "b44f48d7540cf2cd2b59172aff36d97378554ecfcaa1a1942185272c4e234d01",
    "brightness_up@5": "aa6fa085284e42ab062cc782d79fa3bb485be413f9b501fa5209b1f6ed3ddcf4",
    "brightness_down@1": "a55c6afa40669068c431e0c4642899be6a97065dc776ebc04527f762fdc4b257",
    "brightness_down@5": "75be1c2437f29247a5e06748c234594e3444068274b74c867111631ed57efa05",
    "contrast_up@1": "1554df204a5eb0344f7a17f41ac14084710eb82b5f7fc0d621ae9ed03c0a7048",
    "contrast_up@5": "dacdadfa1504725723c837726660f55a09e0a799993864fbf8d663c6581c3beb",
    "contrast_down@1": "4df0a39b9f56cb726e8b93b6c6f17365dc68e182ac9e41f78bbfe009054c865d",
    "contrast_down@5": "2eccfafdf2344f5a81c92f1adeada72742e8c0399b4e0a13d1e43a2c23dacd34",
    "gamma_corr_up@1": "84763f543d5c1be4a2c5175c0a595a15c9cbe69be31a8b6f5eb31506381f06cb",
    "gamma_corr_up@5": "508a3ec58bdb5790786ca866390e267b9d546c0cf5d292712dbb34ab919555a4",
    "gamma_corr_down@1": "2fa1d4f8dda35b0e2375e86f32468d7ad4f709debb6c9d56c432700cc6c10613",
    "gamma_corr_down@5": "c69d94e7713c6c6dd27bbf5bb29da814df85a86e4efe69c28d49317b3e33f36c",
    "inversion@1": "810f4e011a64f0147280fb030c4826c1234219869b0462b7b6211c5ecaaacd2d",
    "crop@1": "1bb4ea700f7c19ebe0dbe05ccd6b95890dcb77ad9dedcea54425caf9706a9001",
    "crop@5": "60725466c058c2122bff5b3d97a69bc4223b1acc2f27d0424ed1348ff24d78be",
    "border@1": "fd4e7aacd74b4184755392b235b36fafee761af8da12d67190f441bb971837c1",
    "border@5": "d96f5f931df15ba87a668e36c40ce0c9c11896dd72ab2f12cafb12267206a069",
    "left_right_flip@1": "a760454ef72cac815dffa0bf1472b1e686cef2a068efc8f85dd556e22a4b0e7c",
}


def name_of(value: object) -> str:
    return f"{value.modality}-{value.name}" if isinstance(value, Corruption) else str(value)


def picture(width: int = 160, height: int = 160) -> Image.Image:
    """A grey picture with edges and slopes that Pillow draws alike everywhere."""
    disc = Image.radial_gradient("L").resize((width, height), Image.Resampling.NEAREST)
    slope = Image.linear_gradient("L").resize((width, height), Image.Resampling.NEAREST)
    return Image.composite(disc, slope, disc.point([255 * (value // 32 % 2) for value in range(256)]))


def coloured(width: int = 96, height: int = 80) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=(0, 0, width / 4, height / 4))


def pixels_sha256(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def similarity(first: Image.Image, second: Image.Image) -> float:
    """Mean SSIM over windows of 7 x 7 (Wang et al. 2004, uniform weights)."""
    x, y = (np.asarray(image.convert("L"), dtype=np.float64) for image in (first, second))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return uniform_filter(values, 7)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


@pytest.fixture(scope="module")
def radiographs() -> list[Image.Image]:
    """Eight pictures of the demo set, at the size at which severities were tuned."""
    drawn = [pixels for case in generate_cases(DEMO_SEED, 6) for _, pixels in case.pictures]
    return [Image.fromarray(pixels).resize((TUNED_SIZE, TUNED_SIZE)) for pixels in drawn[:8]]


def test_each_modality_has_what_was_published_and_chest_our_own() -> None:
    counts = {modality: len(corruptions_of(modality)) for modality in MODALITIES}
    assert counts == {"chest": 21, "ct": 13, "fundus": 8, "oct": 6, "mri": 3}
    assert len({(corruption.modality, corruption.name) for corruption in CORRUPTIONS}) == len(CORRUPTIONS)
    assert find_corruption("impulse_noise", "chest").levels == (0.01, 0.03, 0.06, 0.09, 0.17)
    assert find_corruption("shot_noise", "ct").levels == (200, 100, 50, 25, 15)
    assert find_corruption("defocus_blur", "fundus").level(5) == (8, 0.5)
    controls = [corruption.name for corruption in CORRUPTIONS if corruption.control]
    assert controls == ["left_right_flip"]


def test_the_page_lists_every_corruption_with_its_levels_and_source() -> None:
    rows = set(PAGE.read_text(encoding="utf-8").splitlines())
    expected = [page_row(corruption) for corruption in CORRUPTIONS]
    assert [row for row in expected if row not in rows] == []
    assert len([row for row in rows if row.startswith(tuple(f"| {name} |" for name in MODALITIES))]) == len(expected)


def page_row(corruption: Corruption) -> str:
    levels = ["(" + ", ".join(map(str, x)) + ")" if isinstance(x, tuple) else str(x) for x in corruption.levels]
    shown = " ".join(levels) if len(levels) > 1 else "no degrees"
    note = ", a control" if corruption.control else f", extra `{corruption.extra}`" if corruption.extra else ""
    return f"| {corruption.modality} | {corruption.name} | {shown} | {corruption.source}{note} |"


@pytest.mark.parametrize("corruption", [c for c in WITHOUT_EXTRA if len(c.levels) > 1], ids=name_of)
def test_a_higher_severity_is_less_like_the_clean_image(corruption: Corruption, radiographs: list[Image.Image]) -> None:
    means = [
        fmean(
            similarity(image, corrupt(image, corruption, severity, key=f"{number}", seed=seed))
            for number, image in enumerate(radiographs)
            for seed in (range(3) if corruption.name in RANDOM else (0,))
        )
        for severity in corruption.severities
    ]
    if (corruption.modality, corruption.name) in ONLY_ENDS_ORDERED:
        means = [means[0], *means[2:]]
    assert means[0] < 0.9999, means
    assert all(later < earlier for earlier, later in pairwise(means)), means


def test_the_measure_of_likeness_itself() -> None:
    image = picture()
    assert similarity(image, image) == pytest.approx(1)
    assert similarity(image, corrupt(image, find_corruption("inversion", "chest"), 1, key="a")) < 0


@pytest.mark.parametrize(("corruption", "severity"), EVERY_CASE, ids=name_of)
def test_size_and_mode_stay_and_the_input_is_not_touched(corruption: Corruption, severity: int) -> None:
    for image in (picture(37, 53), picture(301, 263), picture(1, 1), coloured(41, 29)):
        before = image.tobytes()
        result = corrupt(image, corruption, severity, key="k")
        assert (result.mode, result.size) == (image.mode, image.size)
        assert image.tobytes() == before


@pytest.mark.parametrize("corruption", WITHOUT_EXTRA, ids=name_of)
def test_grey_stays_grey_and_is_what_the_single_channel_gives(corruption: Corruption) -> None:
    for image in (picture(), picture(500, 460)):
        severity = corruption.severities[-1]
        grey = corrupt(image, corruption, severity, key="k")
        channels = corrupt(image.convert("RGB"), corruption, severity, key="k").split()
        assert len(channels) == 3
        assert {channel.tobytes() for channel in channels} == {grey.tobytes()}


def test_blurs_against_scipy() -> None:
    image = picture(224, 224)
    values = np.asarray(image, dtype=float)
    blurred = corrupt(image, find_corruption("gaussian_blur", "chest"), 5, key="k")
    expected = gaussian_filter(values, sigma=0.3 * ((11 - 1) / 2 - 1) + 0.8, mode="nearest")
    inside = np.abs(np.asarray(blurred) - expected)[12:-12, 12:-12]
    assert inside.mean() < 0.6  # Pillow's is three extended boxes, with edges of its own
    assert inside.max() < 6

    defocused = corrupt(image, find_corruption("defocus_blur", "fundus"), 1, key="k")
    steps = np.arange(-4, 5)
    disc = (steps[:, None] ** 2 + steps**2 <= 16).astype(float)  # an edge of sigma 0.1 softens nothing
    assert np.abs(np.asarray(defocused) - convolve(values, disc / disc.sum(), mode="nearest")).max() <= 0.51

    dot = Image.new("L", (225, 225))
    dot.putpixel((112, 112), 255)
    trail = np.asarray(corrupt(dot, find_corruption("motion_blur", "oct"), 5, key="k"), dtype=float)
    rows, columns = np.nonzero(trail)
    assert columns.min() == 112  # to one side
    along = trail.sum(axis=0)[112:]
    assert all(later <= earlier + 3 for earlier, later in pairwise(along[1:]))  # no beads; grey values are whole
    assert np.abs(rows - 112).max() <= columns.max() - 112 + 1  # within 45 degrees
    assert np.hypot(rows - 112, columns - 112).max() == pytest.approx(40, abs=3)  # the last steps round to 0


def test_grey_values_by_hand() -> None:
    image = Image.fromarray(np.array([[0, 40, 100, 180, 255]], dtype=np.uint8))

    def values(name: str, severity: int) -> list[int]:
        return np.asarray(corrupt(image, find_corruption(name, "chest"), severity, key="k"))[0].tolist()

    assert values("brightness_up", 5) == [0, 60, 150, 255, 255]
    assert values("brightness_down", 5) == [0, 20, 50, 90, 127]
    assert values("contrast_down", 5) == [69, 85, 109, 141, 171]  # mean 115
    assert values("gamma_corr_up", 5) == [round(255 * (x / 255) ** 1.6) for x in (0, 40, 100, 180, 255)]
    assert values("inversion", 1) == [255, 215, 155, 75, 0]
    low = [(0.5 + sign * 0.15) - 0.25 for sign in (1, -1)]
    windows = [[round(min(max((x / 255 - edge) / 0.5, 0), 1) * 255) for x in (0, 40, 100, 180, 255)] for edge in low]
    assert values("window_level", 5) in windows


def test_noise_on_colour_is_drawn_for_each_channel() -> None:
    image = Image.new("RGB", (64, 64), (128, 127, 128))
    noisy = np.asarray(corrupt(image, find_corruption("gaussian_noise", "fundus"), 5, key="k"), dtype=float)
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.1


def test_noise_has_the_strength_that_is_declared() -> None:
    grey = Image.new("L", (224, 224), 128)
    for severity, sigma in enumerate((0.04, 0.08, 0.12), start=1):
        noisy = np.asarray(corrupt(grey, find_corruption("gaussian_noise", "chest"), severity, key="k")) / 255
        assert noisy.std() == pytest.approx(sigma, rel=0.03)
        assert noisy.mean() == pytest.approx(128 / 255, abs=0.003)
    speckled = np.asarray(corrupt(grey, find_corruption("speckle_noise", "chest"), 2, key="k")) / 255
    assert speckled.std() == pytest.approx(0.15 * 128 / 255, rel=0.03)
    shot = np.asarray(corrupt(grey, find_corruption("shot_noise", "chest"), 1, key="k")) / 255
    assert shot.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.03)
    struck = np.asarray(corrupt(grey, find_corruption("impulse_noise", "chest"), 5, key="k"))
    assert (struck == 0).mean() == pytest.approx(0.085, abs=0.006)
    assert (struck == 255).mean() == pytest.approx(0.085, abs=0.006)


@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise", "impulse_noise", "shot_noise", "gaussian_blur"])
def test_a_large_image_is_as_damaged_at_the_size_that_models_see(name: str) -> None:
    large = picture(896, 896)
    seen = large.resize((224, 224), Image.Resampling.BOX)
    corruption = find_corruption(name, "chest")
    for severity in (1, 5):
        of_large = corrupt(large, corruption, severity, key="k").resize((224, 224), Image.Resampling.BOX)
        assert similarity(seen, of_large) == pytest.approx(
            similarity(seen, corrupt(seen, corruption, severity, key="k")), abs=0.04
        )


def digests(cases: list[tuple[str, str, int, str, int]]) -> dict[str, str]:
    """What a process makes of cases (modality, name, severity, key, seed), in their order."""
    made = {}
    for modality, name, severity, key, seed in cases:
        image = picture(200, 170) if len(key) % 2 else coloured()
        result = corrupt(image, find_corruption(name, modality), severity, key=key, seed=seed)
        made[f"{modality} {name} {severity} {key} {seed}"] = pixels_sha256(result)
    return made


def test_the_same_bytes_in_another_order_another_batch_and_another_process() -> None:
    cases = [
        (corruption.modality, corruption.name, severity, key, seed)
        for corruption, severity in EVERY_CASE
        for key, seed in (("a", 0), ("bc", 1))
    ]
    here = digests(cases)
    assert len(here) == len(cases)
    assert digests(cases[::-1]) == here
    np.random.seed(5)  # noqa: NPY002 - the global state must not matter
    assert digests(cases[7::11]) == {name: here[name] for name in digests(cases[7::11])}
    code = "import json, sys, test_image as t; print(json.dumps(t.digests(json.loads(sys.stdin.read()))))"
    there = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(cases[::-1]),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(there.stdout) == here


@pytest.mark.parametrize("corruption", [c for c in WITHOUT_EXTRA if c.modality == "chest"], ids=name_of)
def test_key_and_seed_decide_what_is_drawn_and_nothing_else(corruption: Corruption) -> None:
    image = picture()
    severity = corruption.severities[-1]
    by_key = {pixels_sha256(corrupt(image, corruption, severity, key=f"{key}")) for key in range(12)}
    by_seed = {pixels_sha256(corrupt(image, corruption, severity, key="k", seed=seed)) for seed in range(12)}
    assert (len(by_key) > 1, len(by_seed) > 1) == (corruption.name in RANDOM,) * 2


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_pixels(case: str) -> None:
    name, severity = case.split("@")
    result = corrupt(picture(), find_corruption(name, "chest"), int(severity), key="k")
    assert pixels_sha256(result) == GOLDEN[case]


@pytest.mark.parametrize("name", ["left_right_flip", "inversion"])
def test_twice_is_the_identity(name: str, radiographs: list[Image.Image]) -> None:
    corruption = find_corruption(name, "chest")
    for image in (radiographs[0], coloured()):
        once = corrupt(image, corruption, 1, key="a")
        assert once.tobytes() != image.tobytes()
        assert corrupt(once, corruption, 1, key="b").tobytes() == image.tobytes()


def test_a_side_marker_stands_where_it_is_true() -> None:
    image = Image.new("L", (400, 400), 60)
    marker = find_corruption("burned_in_marker", "chest")
    ink: dict[str, set[int]] = {"left": set(), "right": set()}
    for seed in range(12):
        text = np.asarray(corrupt(image, marker, 2, key="k", seed=seed)) > 200
        left, right = int(text[:, :200].sum()), int(text[:, 200:].sum())
        assert min(left, right) == 0
        ink["left" if left else "right"].add(left + right)
    assert min(ink["left"]) > 1.3 * max(ink["right"])  # an R has more strokes than an L


def test_a_receding_side_is_shorter_by_twice_the_share() -> None:
    white = Image.new("L", (200, 200), 255)
    shown = np.asarray(corrupt(white, find_corruption("tilt", "chest"), 5, key="k")) > 127
    sides = sorted(int(side.sum()) for side in (shown[1], shown[-2], shown[:, 1], shown[:, -2]))
    # The two sides between lie aslant, so that the outermost row or column meets little of them.
    assert sides[2] == pytest.approx(200 * (1 - 2 * 0.15), abs=3)
    assert sides[3] == pytest.approx(200, abs=3)


def test_the_identity_covers_all_that_decides_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = find_corruption("gaussian_noise", "chest")
    texts = [identity(corruption, severity) for corruption, severity in EVERY_CASE]
    assert len(set(texts)) == len(texts)
    assert identity(noise, 1, seed=1) != identity(noise, 1)
    assert identity(noise, 3) == identity(find_corruption("gaussian_noise", "chest"), 3)
    mended = Corruption("gaussian_noise", "chest", (0.05, *noise.levels[1:]), noise.apply, noise.source)
    assert identity(mended, 1) != identity(noise, 1)
    before = identity(noise, 1)
    monkeypatch.setattr(base, "_code_sha256", lambda module: "another" * 4)
    assert identity(noise, 1) != before


def test_suites() -> None:
    for modality in ("chest", "ct", "fundus", "oct"):
        quick = find_suite("quick", modality)
        assert len({case.corruption.name for case in quick}) == 5
        assert [case.severity for case in quick] == [1, 3, 5] * 5
    full = find_suite("full", "chest")
    assert len(full) == 19 * 5 + 1
    assert "left_right_flip" not in {case.corruption.name for case in full}
    assert set(find_suite("quick", "chest")) < set(full)


@pytest.mark.parametrize(
    ("name", "modality", "message"),
    [
        ("gausian_noise", "chest", "Unknown corruption 'gausian_noise' of modality chest. Did you mean gaussian_noise"),
        ("tilt", "ct", "Corruption tilt is declared for chest, not for ct, which has pixelate, "),
        ("tilt", "chst", "Unknown modality 'chst'. Did you mean chest"),
    ],
)
def test_an_unknown_name_or_modality_is_one_clear_line(name: str, modality: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        find_corruption(name, modality)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("severity", [0, 6, -1, True, 2.0])
def test_a_severity_out_of_range_is_refused(severity: int) -> None:
    with pytest.raises(UserError, match="Severity of tilt: expected 1 to 5, got"):
        corrupt(picture(), find_corruption("tilt", "chest"), severity, key="k")
    with pytest.raises(UserError, match="Severity of tilt"):
        identity(find_corruption("tilt", "chest"), severity)


def test_what_else_is_refused() -> None:
    noise, flip = find_corruption("gaussian_noise", "chest"), find_corruption("left_right_flip", "chest")
    with pytest.raises(UserError, match=r"expected 1 alone \(it has no degrees\), got 3"):
        corrupt(picture(), flip, 3, key="k")
    with pytest.raises(UserError, match="mode L or RGB, got RGBA"):
        corrupt(picture().convert("RGBA"), noise, 1, key="k")
    with pytest.raises(UserError, match="content hash"):
        corrupt(picture(), noise, 1, key="")
    with pytest.raises(UserError, match=r"Unknown suite 'quik' of image corruptions\. Did you mean quick"):
        find_suite("quik", "chest")
    with pytest.raises(UserError, match="needs five levels, or one"):
        Corruption("mine", "chest", (1, 2), noise.apply, "mine")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.EXTRAS, "mri", "no-such-library")
    gibbs = find_corruption("gibbs_ringing", "mri")
    message = r"^Corruption gibbs_ringing needs no-such-library: .*pip install 'medvlm-harness\[mri\]'`\.$"
    with pytest.raises(UserError, match=message):
        corrupt(picture(), gibbs, 1, key="k")
    with pytest.raises(UserError, match=message):
        identity(gibbs, 1)


@pytest.mark.parametrize("corruption", [c for c in CORRUPTIONS if c.extra == "mri"], ids=name_of)
def test_artefacts_of_magnetic_resonance(corruption: Corruption, radiographs: list[Image.Image]) -> None:
    pytest.importorskip("monai", reason="needs the extra mri")
    means = []
    for severity in corruption.severities:
        made = [corrupt(image, corruption, severity, key=f"{n}") for n, image in enumerate(radiographs)]
        again = [corrupt(image, corruption, severity, key=f"{n}") for n, image in enumerate(radiographs)]
        assert [image.tobytes() for image in made] == [image.tobytes() for image in again]
        assert {(image.mode, image.size) for image in made} == {("L", radiographs[0].size)}
        means.append(fmean(similarity(*pair) for pair in zip(radiographs, made, strict=True)))
    assert means[0] < 0.9999, means
    assert all(later < earlier for earlier, later in pairwise(means)), means
    odd = corrupt(coloured(41, 29), corruption, 5, key="k")
    assert (odd.mode, odd.size) == ("RGB", (41, 29))


def test_the_sheet_has_a_row_for_each_corruption_and_a_column_for_each_severity() -> None:
    image = picture(400, 300)
    rows = [find_corruption(name, "chest") for name in ("inversion", "gaussian_blur")]
    sheet = contact_sheet(image, rows, (1, 5), key="k")
    taller = contact_sheet(image, rows * 2, (1, 5), key="k")
    wider = contact_sheet(image, rows, (1, 3, 5), key="k")
    assert taller.height - sheet.height == 2 * (wider.width - sheet.width - CELL + 144 + 18)
    shown = image.resize((CELL, CELL * 3 // 4), Image.Resampling.BOX).convert("RGB").tobytes()
    clean = [
        (left, top)
        for left in range(sheet.width - CELL)
        for top in (34, 34 + 170, 52, 52 + 170)
        if sheet.crop((left, top, left + CELL, top + 144)).tobytes() == shown
    ]
    assert len(clean) == 2
