"""Blocks of similarities between queries and a gallery, and how many of a row exceed or equal a value.

A block is computed once and compared where it lies: products of another shape may differ in the last bit, and items
that tie would no longer. There is one class for NumPy and one for a torch device; torch is imported for the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_CACHED = 2**18  # numbers that stay in the cache, 2 MB

__all__ = ["NumpySimilarity", "Similarity", "TorchSimilarity"]


class Similarity(Protocol):
    """Inner products of a block of queries with the whole gallery, in float32."""

    def at(self, queries: NDArray[np.float32], row: NDArray[np.intp], column: NDArray[np.intp]) -> NDArray[np.float32]:
        """Compute the block of these queries, and pick some of its values.

        Args:
            queries: shape (rows, d).
            row: shape (k,).
            column: gallery vector, shape (k,).
        """

    def counts(self, row: NDArray[np.intp], best: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Items that are more similar than a value in a row of the block computed last, and exactly as similar.

        Args:
            row: shape (k,).
            best: the value, shape (k,).
        """


class NumpySimilarity:
    """On the CPU.

    Args:
        gallery: distinct vectors, those with several copies last, shape (m, d).
        copies: number of items that have each vector, ascending, shape (m,).
        rows: queries in the largest block.
    """

    def __init__(self, gallery: NDArray[np.float32], copies: NDArray[np.int64], rows: int) -> None:
        self._gallery = gallery
        self._single = np.searchsorted(copies, 1, side="right")
        self._further = copies[self._single :].astype(np.float64) - 1
        # One room for all blocks: to touch new memory for each takes a tenth of the time or more.
        self._room = np.empty((rows, len(gallery)), dtype=np.float32)

    def at(self, queries: NDArray[np.float32], row: NDArray[np.intp], column: NDArray[np.intp]) -> NDArray[np.float32]:
        """See `Similarity`."""
        self._block = np.matmul(queries, self._gallery.T, out=self._room[: len(queries)])
        picked: NDArray[np.float32] = self._block[row, column]
        return picked

    def counts(self, row: NDArray[np.intp], best: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Similarity`."""
        # Row by row: a row and its mask stay in the cache, and a flat mask is counted much faster than by axis.
        greater, tied = np.empty((2, len(best)), dtype=np.int64)
        for k, (number, value) in enumerate(zip(row.tolist(), best, strict=True)):
            similar = self._block[number]
            greater[k], tied[k] = np.count_nonzero(similar > value), np.count_nonzero(similar == value)
        # Of a vector with several copies one was counted. The sums are exact: whole numbers below 2**53.
        step = max(1, _CACHED // max(1, self._further.size))
        for start in range(0, len(best), step):
            part = slice(start, start + step)
            repeated, value = self._block[row[part], self._single :], best[part, None]
            greater[part] += ((repeated > value) @ self._further).astype(np.int64)
            tied[part] += ((repeated == value) @ self._further).astype(np.int64)
        return greater, tied


class TorchSimilarity:
    """On a torch device, in the precision that torch is set to (float32 unless TF32 was allowed).

    Args:
        gallery: distinct vectors, shape (m, d).
        copies: number of items that have each vector, shape (m,).
        device: as torch spells it.
    """

    def __init__(self, gallery: NDArray[np.float32], copies: NDArray[np.int64], device: str) -> None:
        self._device = device
        self._gallery, self._copies = self._sent(gallery), self._sent(copies)

    def at(self, queries: NDArray[np.float32], row: NDArray[np.intp], column: NDArray[np.intp]) -> NDArray[np.float32]:
        """See `Similarity`."""
        self._block = self._sent(queries) @ self._gallery.T
        picked: NDArray[np.float32] = self._block[self._sent(row), self._sent(column)].cpu().numpy()
        return picked

    def counts(self, row: NDArray[np.intp], best: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Similarity`."""
        greater, tied = np.empty((2, len(best)), dtype=np.int64)
        for start in range(0, len(best), len(self._block)):  # a row may be asked for several times
            part = slice(start, start + len(self._block))
            similar, value = self._block[self._sent(row[part])], self._sent(best[part])[:, None]
            greater[part], tied[part] = self._items(similar > value), self._items(similar == value)
        return greater, tied

    def _items(self, mask: torch.Tensor) -> NDArray[np.int64]:
        items: NDArray[np.int64] = (mask * self._copies).sum(dim=1).cpu().numpy()
        return items

    def _sent(self, array: NDArray[np.generic]) -> torch.Tensor:
        import torch

        return torch.from_numpy(array).to(self._device)
