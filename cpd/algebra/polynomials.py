"""Sums of products of dimensions, at many widths at once: numpy arrays instead of a walk over expressions.

A dimension is a polynomial in the widths of its axes: products multiply, concatenations add. A cost is a weighted sum
of products of dimensions. Both are laid out as arrays of indices once; evaluating a candidate is then a few gathers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Concat, Dim, Fixed, Product

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
#: Axes, repeated by their power -> coefficient.
Polynomial = dict[tuple[int, ...], int]


class ProductSums:
    """Weighted sums of products of dimensions, as functions of the widths of their open axes.

    Args:
        products: the dimensions of each product.
        weights: [products, figures]; what each product adds to each figure: integers, or floats.
        figures: their number.
    """

    def __init__(self, products: Sequence[Sequence[Dim]], weights: Sequence[Sequence[float]], figures: int) -> None:
        self._weights = np.array(weights).reshape(len(products), figures)
        dims = list(dict.fromkeys(axes.resolve(dim) for product in products for dim in product))
        self.axes = list(dict.fromkeys(axis for dim in dims for axis in axes.leaves(dim) if axis.frozen is None))
        index = {axis: number for number, axis in enumerate(self.axes)}
        place = {dim: number for number, dim in enumerate(dims)}
        found = [(number, item) for number, dim in enumerate(dims) for item in _polynomial(dim, index).items()]
        self._monomials = _padded([powers for _, (powers, _) in found], len(self.axes))
        self._coefficients = np.array([coefficient for _, (_, coefficient) in found], dtype=np.int64)
        self._of = np.array([number for number, _ in found], dtype=np.int64)
        self._starts = np.flatnonzero(np.diff(self._of, prepend=-1))  # every dimension has a monomial
        self._dims = len(dims)
        #: The column of each dimension, resolved, in what `dims` gives.
        self.places = place
        self._present = np.ones(len(self.axes), dtype=np.int64)
        self._products = _padded([[place[axes.resolve(dim)] for dim in product] for product in products], len(dims))

    def weighted(self, factors: npt.NDArray[Any]) -> ProductSums:
        """The same sums, each weight times its factor: [products, figures], or what broadcasts to that."""
        other = copy(self)
        other._weights = self._weights * factors
        return other

    def without(self, absent: Collection[Axis]) -> ProductSums:
        """The same sums where no position is left of some axes, whatever widths are given."""
        other = copy(self)
        other._present = self._present * np.array([axis not in absent for axis in self.axes], dtype=np.int64)
        return other

    def widths(self, counts: Mapping[Axis, int]) -> Numbers:
        """[axes]: the width of each axis, whole where it is not named."""
        return np.array([counts.get(axis, axis.size) for axis in self.axes], dtype=np.int64) * self._present

    def __call__(self, widths: npt.ArrayLike) -> npt.NDArray[Any]:
        """[candidates, axes] -> [candidates, figures], exact where the weights are integers."""
        found: npt.NDArray[Any] = self._product_values(self._dim_values(np.asarray(widths, dtype=np.int64)))
        figures: npt.NDArray[Any] = found @ self._weights
        return figures

    def slopes(self, widths: npt.ArrayLike) -> Floats:
        """[axes] -> [axes, figures]: what each figure gains by one position more of each axis, to first order."""
        at: Floats = np.asarray(widths, dtype=np.float64) * self._present
        by_dim = np.zeros((self._dims + 1, self._weights.shape[1]))
        for column, others in _others(_gathered(self._dim_values(at[None]), self._products)[0]):
            np.add.at(by_dim, self._products[:, column], others[:, None] * self._weights)
        by_axis = np.zeros((len(self.axes) + 1, self._weights.shape[1]))
        inner = self._coefficients[:, None] * by_dim[self._of]
        for column, others in _others(_gathered(at[None], self._monomials)[0]):
            np.add.at(by_axis, self._monomials[:, column], others[:, None] * inner)
        return by_axis[:-1]

    def dims(self, widths: npt.ArrayLike) -> Numbers:
        """[candidates, axes] -> [candidates, dims]: how wide each dimension is."""
        values: Numbers = self._dim_values(np.asarray(widths, dtype=np.int64)).astype(np.int64)
        return values

    def _dim_values(self, widths: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """[candidates, axes] -> [candidates, dims]."""
        values = _gathered(np.multiply(widths, self._present), self._monomials).prod(-1) * self._coefficients
        found: npt.NDArray[np.generic] = np.add.reduceat(values, self._starts, axis=1)
        return found

    def _product_values(self, dims: npt.NDArray[np.generic]) -> Numbers:
        found: Numbers = _gathered(dims, self._products).prod(-1)
        return found


def _polynomial(dim: Dim, index: Mapping[Axis, int]) -> Polynomial:
    """A resolved dimension as a polynomial in the widths of these axes; all others are whole."""
    if isinstance(dim, Axis) and dim in index:
        return {(index[dim],): 1}
    if isinstance(dim, (Fixed, Axis)):
        return {(): dim.size}
    parts = [_polynomial(axes.resolve(part), index) for part in (dim.segments if isinstance(dim, Concat) else _of(dim))]
    result: Polynomial = {} if isinstance(dim, Concat) else {(): 1}
    for part in parts:
        terms = part.items() if isinstance(dim, Concat) else _multiplied(result, part)
        result = result if isinstance(dim, Concat) else {}
        for powers, coefficient in terms:
            result[powers] = result.get(powers, 0) + coefficient
    return result


def _of(dim: Dim) -> tuple[Dim, ...]:
    assert isinstance(dim, Product)
    return dim.factors


def _multiplied(left: Polynomial, right: Polynomial) -> Iterator[tuple[tuple[int, ...], int]]:
    for powers, coefficient in left.items():
        for others, factor in right.items():
            yield tuple(sorted((*powers, *others))), coefficient * factor


def _padded(rows: Sequence[Sequence[int]], blank: int) -> Numbers:
    """Rows of indices made equally long by an index of a value that is 1."""
    length = max((len(row) for row in rows), default=0)
    found = np.full((len(rows), length), blank, dtype=np.int64)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return found


def _gathered(values: npt.NDArray[np.generic], index: Numbers) -> npt.NDArray[np.generic]:
    """[candidates, n] at [rows, length] -> [candidates, rows, length]; the index n stands for 1."""
    padded = np.concatenate([values, np.ones((len(values), 1), dtype=values.dtype)], axis=1)
    return padded[:, index]


def _others(values: npt.NDArray[np.generic]) -> Iterator[tuple[int, Floats]]:
    """[rows, length]: for each column, the product of all others."""
    for column in range(values.shape[1]):
        yield column, np.delete(values, column, axis=1).prod(-1)
