"""Many logistic regressions on one feature matrix at once: other labels, other items, other penalties.

A probe with inner cross-validation fits one model per label, seed, fold and penalty: thousands over the same features.
One by one, each builds and factors Hessians of its own. Together, all take the same steps of Newton's method with
conjugate gradients, whose cost is two matrix products for all of them. The solutions are the same: each problem is
convex and is followed until its gradient vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

__all__ = ["LogisticFits", "fit_logistic"]

Floats = NDArray[np.float64]

TOLERANCE = 1e-8  # largest entry of the gradient of the mean loss, in standardised features
STEPS = 100  # of Newton's method; some ten are needed
INNER_STEPS = 500
SUFFICIENT = 1e-4  # Armijo's condition
_BLOCK_ELEMENTS = 2**20  # items times problems that are followed at once


class LogisticFits(NamedTuple):
    """One model per problem: log-odds = features @ coefficients + intercept, in the features' own scale."""

    coefficients: Floats  # (d, problems)
    intercept: Floats  # (problems,)

    def log_odds(self, features: ArrayLike) -> Floats:
        """Of each item in each problem, (n, problems)."""
        found: Floats = np.asarray(features, dtype=np.float64) @ self.coefficients + self.intercept
        return found


def fit_logistic(features: ArrayLike, labels: ArrayLike, taken: ArrayLike, penalty: ArrayLike) -> LogisticFits:
    """L2-penalised logistic regressions after standardisation, as scikit-learn's StandardScaler and LogisticRegression.

    Each problem standardises by the items that it takes; its intercept is not penalised.

    Args:
        features: shared by all problems, finite, (n, d).
        labels: 0 or 1 for items that are taken, (n, problems), or (n, 1) where all problems have the same.
        taken: True for the items that a problem learns from, both classes among them, (n, problems).
        penalty: C of each problem: the inverse of the penalty's strength, above 0, (problems,).

    Raises:
        ValueError: if the shapes do not fit, C is not above 0, a problem lacks a class, or one does not converge.

    Source: Newton-CG, Nocedal and Wright 2006, algorithm 7.1.
    """
    x, y, mask, c = _checked(features, labels, taken, penalty)
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale <= 10 * np.finfo(np.float64).eps * np.abs(x).max(axis=0, initial=0)] = 1
    standard = (x - centre) / scale
    spectrum = _Spectrum(*np.linalg.eigh(standard.T @ standard / len(x)))
    solved = [
        _Problems(standard, spectrum, y[:, block], mask[:, block].astype(np.float64), 1 / c[block]).solve()
        for block in _blocks(len(x), len(c))
    ]
    coefficients = np.concatenate([one for one, _ in solved], axis=1) / scale[:, None]
    return LogisticFits(coefficients, np.concatenate([one for _, one in solved]) - centre @ coefficients)


class _Spectrum(NamedTuple):
    """Eigenvalues (d,) and eigenvectors (d, d) of the features' covariance."""

    values: Floats
    vectors: Floats


class _Problems:
    """A block of problems; columns are problems, and all shapes below are (n, problems) or (d, problems)."""

    def __init__(self, x: Floats, spectrum: _Spectrum, y: Floats, taken: Floats, strength: Floats) -> None:
        self.x, self.spectrum, self.y, self.taken = x, spectrum, y, taken
        self.size = taken.sum(axis=0)
        # Penalising standardised coefficients is penalising those of the shared features times the variance that
        # they have among the items taken; where these are constant, scikit-learn's scale is 1.
        mean = x.T @ taken / self.size
        variance = np.maximum((x * x).T @ taken / self.size - mean**2, 0)
        self.ridge = strength * np.where(variance > 1e-12, variance, 1.0)

    def solve(self) -> tuple[Floats, Floats]:
        """Coefficients (d, problems) and intercepts (problems,)."""
        share = (self.y * self.taken).sum(axis=0) / self.size
        w, b = np.zeros_like(self.ridge), np.log(share) - np.log1p(-share)
        z = np.broadcast_to(b, self.y.shape).copy()
        active = np.arange(len(b))
        for _ in range(STEPS):
            part = self._only(active)
            p = expit(z[:, active])
            error = part.taken * (p - part.y)
            gradient, of_b = self.x.T @ error + part.ridge * w[:, active], error.sum(axis=0)
            far = np.maximum(np.abs(gradient).max(axis=0, initial=0), np.abs(of_b)) > TOLERANCE * part.size
            if not far.any():
                return w, b
            active, part = active[far], part._only(far)
            gradient, of_b = gradient[:, far], of_b[far]
            curvature = part.taken * p[:, far] * (1 - p[:, far])
            step, step_b = part._newton(curvature, gradient, of_b)
            along = self.x @ step + step_b
            slope = (gradient * step).sum(axis=0) + of_b * step_b
            length = part._lengths(w[:, active], z[:, active], step, along, slope)
            w[:, active] += length * step
            b[active] += length * step_b
            z[:, active] += length * along
        raise ValueError(f"Expected logistic regressions to converge in {STEPS} steps, but {len(active)} did not.")

    def _only(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> _Problems:
        part = object.__new__(_Problems)
        part.x, part.spectrum = self.x, self.spectrum
        part.y, part.taken, part.ridge = self.y[:, which], self.taken[:, which], self.ridge[:, which]
        part.size = self.size[which]
        return part

    def _newton(self, curvature: Floats, gradient: Floats, of_b: Floats) -> tuple[Floats, Floats]:
        """Steps that solve Hessian @ step = -gradient, each as well as its distance from the solution is worth."""
        values, vectors = self.spectrum
        weight = curvature.sum(axis=0)
        near = np.outer(values, weight) + self.ridge.mean(axis=0)  # the Hessian, were the curvature everywhere the same

        def solved(r: Floats, r_b: Floats) -> tuple[Floats, Floats]:
            return vectors @ (vectors.T @ r / near), r_b / weight

        def norm(r: Floats, r_b: Floats) -> Floats:
            found: Floats = np.sqrt((r * r).sum(axis=0) + r_b * r_b)
            return found

        step, step_b = np.zeros_like(gradient), np.zeros_like(of_b)
        rest, rest_b = -gradient, -of_b
        first = norm(rest, rest_b)
        enough = first * np.minimum(0.1, np.sqrt(first / self.size))
        toward, toward_b = (one.copy() for one in solved(rest, rest_b))
        product = (rest * toward).sum(axis=0) + rest_b * toward_b
        for _ in range(INNER_STEPS):
            going = norm(rest, rest_b) > enough
            if not going.any():
                break
            bent = curvature * (self.x @ toward + toward_b)
            image, image_b = self.x.T @ bent + self.ridge * toward, bent.sum(axis=0)
            bend = (toward * image).sum(axis=0) + toward_b * image_b
            by = np.divide(product, bend, out=np.zeros_like(bend), where=going & (bend > 0))
            step, step_b = step + by * toward, step_b + by * toward_b
            rest, rest_b = rest - by * image, rest_b - by * image_b
            better, better_b = solved(rest, rest_b)
            after = (rest * better).sum(axis=0) + rest_b * better_b
            turn = np.divide(after, product, out=np.zeros_like(after), where=going & (product > 0))
            toward, toward_b = better + turn * toward, better_b + turn * toward_b
            product = after
        return step, step_b

    def _lengths(self, w: Floats, z: Floats, step: Floats, along: Floats, slope: Floats) -> Floats:
        """How much of each step to go: all of it, halved until the objective falls as it should."""
        length = np.ones(len(slope))
        now = self._objective(w, z)
        for _ in range(40):
            after = self._objective(w + length * step, z + length * along)
            rounding = 1e-12 * np.abs(now)
            high = after > now + SUFFICIENT * length * slope + rounding
            if not high.any():
                break
            length = np.where(high, length / 2, length)
        return length

    def _objective(self, w: Floats, z: Floats) -> Floats:
        loss = (self.taken * (np.logaddexp(0, z) - self.y * z)).sum(axis=0)
        found: Floats = loss + (self.ridge * w * w).sum(axis=0) / 2
        return found


def _blocks(items: int, problems: int) -> Iterator[slice]:
    at_once = max(1, _BLOCK_ELEMENTS // items)
    yield from (slice(start, start + at_once) for start in range(0, problems, at_once))


def _checked(
    features: ArrayLike, labels: ArrayLike, taken: ArrayLike, penalty: ArrayLike
) -> tuple[Floats, Floats, NDArray[np.bool_], Floats]:
    x, mask, c = np.asarray(features, np.float64), np.asarray(taken, bool), np.asarray(penalty, np.float64)
    shape = np.shape(labels)
    fits = shape in (mask.shape, (len(x), 1)) and len(x) == len(mask) and c.shape == mask.shape[1:]
    if x.ndim != 2 or mask.ndim != 2 or not fits:
        raise ValueError(
            f"Expected features (n, d), labels and taken (n, problems) and penalty (problems,), "
            f"but got {x.shape}, {shape}, {mask.shape} and {c.shape}."
        )
    y = np.where(mask, labels, 0).astype(np.float64)
    if not (c > 0).all():
        raise ValueError(f"Expected C above 0, but got {c[~(c > 0)][0]}.")
    positives, size = y.sum(axis=0), mask.sum(axis=0)
    if not ((positives > 0) & (positives < size)).all():
        raise ValueError("Expected both classes among the items of each problem.")
    return x, y, mask, c
