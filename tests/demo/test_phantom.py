import numpy as np
import pytest
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import CHEXPERT_13
from medvlm_harness.demo.pathology import DRAWN_LABELS
from medvlm_harness.demo.phantom import Anatomy, Finding, View, render, sample_anatomy


def added(finding: Finding, view: View = "frontal", seed: int = 0) -> NDArray[np.float64]:
    """What a finding changes in the picture of one body: brighter is positive."""
    with_it, without = (render(f, view, np.random.default_rng(seed), Anatomy()) for f in ([finding], []))
    return with_it.astype(float) - without.astype(float)


def centre(change: NDArray[np.float64]) -> tuple[float, float]:
    """Centre of the absolute change as fractions (x, y) of the picture."""
    weight = np.abs(change)
    rows, columns = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return (weight * columns).sum() / weight.sum() / weight.shape[1], (weight * rows).sum() / weight.sum() / len(weight)


def test_every_chexpert_observation_can_be_drawn() -> None:
    assert set(DRAWN_LABELS) == set(CHEXPERT_13)


@pytest.mark.parametrize("view", ["frontal", "lateral"])
def test_a_picture_is_eight_bit_grey_and_neither_black_nor_white(view: View) -> None:
    picture = render([], view, np.random.default_rng(1))
    assert picture.shape == (160, 160)
    assert picture.dtype == np.uint8
    assert 60 < picture.mean() < 190
    assert picture.std() > 30


def test_lungs_are_darker_than_the_middle_and_the_belly() -> None:
    pictures = [render([], "frontal", np.random.default_rng(seed)).astype(float) for seed in range(20)]
    mean = np.mean(pictures, axis=0)
    left_lung, right_lung, middle, belly = (
        mean[60:80, 105:120],
        mean[60:80, 40:55],
        mean[60:80, 77:83],
        mean[140:, 60:100],
    )
    assert max(left_lung.mean(), right_lung.mean()) + 40 < min(middle.mean(), belly.mean())


@pytest.mark.parametrize("label", ["Pleural Effusion", "Pneumothorax", "Lung Lesion"])
def test_the_patients_left_is_at_the_pictures_right(label: str) -> None:
    for seed in range(5):
        assert centre(added(Finding(label, "left", 0.6, "middle"), seed=seed))[0] > 0.55
        assert centre(added(Finding(label, "right", 0.6, "middle"), seed=seed))[0] < 0.45


def test_an_effusion_whitens_the_base_and_grows_with_its_size() -> None:
    small, large = (added(Finding("Pleural Effusion", "right", size)) for size in (0.3, 0.9))
    assert 0 < small.clip(0).sum() < large.clip(0).sum()
    assert centre(large)[1] > 0.55
    assert large.sum() > 0


def test_a_pneumothorax_darkens_the_rim() -> None:
    change = added(Finding("Pneumothorax", "left", 0.5))
    assert change.min() < -20
    upper, lower = change[:80], change[80:]
    assert upper.clip(max=0).sum() < lower.clip(max=0).sum()


@pytest.mark.parametrize(("zone", "low", "high"), [("upper", 0.2, 0.45), ("middle", 0.38, 0.58), ("lower", 0.5, 0.75)])
def test_a_nodule_is_a_small_bright_spot_in_its_zone(zone: str, low: float, high: float) -> None:
    change = added(Finding("Lung Lesion", "right", 0.4, zone))
    assert change.max() > 25
    assert (np.abs(change) > 8).mean() < 0.03
    assert low < centre(change)[1] < high


@pytest.mark.parametrize("label", CHEXPERT_13)
def test_every_finding_changes_the_frontal_picture(label: str) -> None:
    site = "pacemaker" if label == "Support Devices" else "middle"
    assert (np.abs(added(Finding(label, "left", 0.7, site))) > 8).sum() > 20


@pytest.mark.parametrize("label", ["Cardiomegaly", "Pleural Effusion", "Lung Lesion", "Edema", "Support Devices"])
def test_these_findings_show_in_the_lateral_view_too(label: str) -> None:
    site = "pacemaker" if label == "Support Devices" else "middle"
    assert (np.abs(added(Finding(label, "left", 0.7, site), "lateral")) > 8).sum() > 20


def test_a_large_heart_is_wider() -> None:
    change = added(Finding("Cardiomegaly", "", 0.8))
    assert change.clip(0).sum() > 3 * -change.clip(max=0).sum()
    assert 0.4 < centre(change)[0] < 0.75


def test_bodies_vary_and_women_have_breast_shadows() -> None:
    rng = np.random.default_rng(3)
    women, men = ([sample_anatomy(rng, sex) for _ in range(20)] for sex in "FM")
    assert len(set(women + men)) == 40
    assert all(body.breast > 0 for body in women)
    assert not any(body.breast for body in men)
