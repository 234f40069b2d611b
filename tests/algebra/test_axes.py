"""The algebra against its meaning: masks before and after every operation must agree position by position."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.algebra import axes
from cpd.algebra.axes import Axis, Concat, Dim, Fixed, Product


def random_keep(dims, rng):
    """A random mask for every open axis; frozen ones keep everything."""
    keep = {}
    for dim in dims:
        for axis in axes.leaves(dim):
            keep.setdefault(axis, np.ones(axis.size, bool) if axis.frozen else rng.random(axis.size) < 0.6)
    return keep


@st.composite
def dimension(draw, depth=2) -> Dim:
    kind = draw(st.sampled_from(["axis", "fixed", "product", "concat"] if depth else ["axis", "fixed"]))
    if kind == "axis":
        return Axis(draw(st.sampled_from([1, 2, 3, 4, 6, 8])))
    if kind == "fixed":
        return Fixed(draw(st.sampled_from([1, 2, 3, 4])))
    parts = [draw(dimension(depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        parts.append(parts[0])
    return axes.product(parts) if kind == "product" else axes.concat(parts)


#: Of a size that every position of can be looked at: products of products soon have billions.
dimensions = dimension().filter(lambda dim: dim.size <= 20_000)


@settings(max_examples=300, deadline=None)
@given(dimensions, st.data(), st.integers(0, 2**32 - 1))
def test_split_keeps_the_positions(dim, data, seed):
    inner = data.draw(st.sampled_from([k for k in range(1, dim.size + 1) if dim.size % k == 0]))
    left, right = axes.split(dim, inner, "test")
    assert left.size * right.size == dim.size
    assert right.size == inner
    keep = random_keep([dim, left, right], np.random.default_rng(seed))
    assert (axes.mask(dim, keep) == axes.mask(axes.product([left, right]), keep)).all()


@settings(max_examples=300, deadline=None)
@given(dimensions, st.data(), st.integers(0, 2**32 - 1))
def test_cut_keeps_the_positions(dim, data, seed):
    offset = data.draw(st.integers(0, dim.size))
    left, right = axes.cut(dim, offset)
    assert (left.size, right.size) == (offset, dim.size - offset)
    keep = random_keep([dim, left, right], np.random.default_rng(seed))
    joined = np.concatenate([axes.mask(left, keep), axes.mask(right, keep)])
    assert (axes.mask(dim, keep) == joined).all()
    assert (axes.mask(axes.concat([left, right]), keep) == joined).all()


@settings(max_examples=500, deadline=None)
@given(dimensions, dimensions, st.data(), st.integers(0, 2**32 - 1))
def test_unified_dimensions_lose_the_same_positions(left, right, data, seed):
    size = min(left.size, right.size)
    left, right = axes.cut(left, size)[0], axes.cut(right, size)[0]
    axes.unify(left, right, "test")
    keep = random_keep([left, right], np.random.default_rng(seed))
    assert (axes.mask(left, keep) == axes.mask(right, keep)).all()


@settings(max_examples=200, deadline=None)
@given(dimensions, st.integers(0, 2**32 - 1))
def test_count_and_labels_agree_with_the_mask(dim, seed):
    keep = random_keep([dim], np.random.default_rng(seed))
    kept = axes.mask(dim, keep)
    assert axes.count(dim, {axis: int(m.sum()) for axis, m in keep.items()}) == kept.sum()
    for axis in set(axes.leaves(dim)):
        alone = axes.mask(dim, {axis: keep[axis]})
        label = axes.labels(dim, axis)
        assert set(label[label >= 0]) == set(range(axis.size))
        if sum(leaf is axis for leaf in axes.leaves(dim)) == 1:
            assert (alone == ((label < 0) | keep[axis][label])).all()


def test_fused_qkv_splits_the_rows_of_its_weight():
    rows = Axis(3 * 4 * 8)
    outer, head_dim = axes.split(rows, 8, "reshape")
    qkv, heads = axes.split(outer, 4, "reshape")
    assert axes.resolve(rows) == Product((qkv, heads, head_dim))


def test_shuffled_halves_become_one_axis_twice():
    a, b = Axis(6), Axis(6)
    groups, channels = axes.split(axes.concat([a, b]), 6, "view")
    assert groups == Fixed(2)
    assert channels == axes.resolve(a) == axes.resolve(b)


def test_four_copies_are_a_fixed_four_times():
    a = Axis(5)
    assert axes.concat([a] * 4) == Product((Fixed(4), a))


def test_flatten_then_linear():
    channels, columns = Axis(8), Axis(8 * 49)
    axes.unify(columns, axes.product([channels, Fixed(7), Fixed(7)]), "linear")
    assert axes.resolve(columns) == Product((channels, Fixed(49)))


def test_meeting_a_fixed_dimension_freezes_with_the_first_reason():
    a = Axis(8)
    axes.unify(a, Fixed(8), "first")
    axes.freeze(a, "second")
    assert a.frozen == "first"


def test_padding_leaves_the_middle_open():
    c, wide = Axis(4), Axis(8)
    axes.unify(wide, axes.concat([Fixed(2), c, Fixed(2)]), "add")
    assert axes.resolve(wide) == Concat((Fixed(2), c, Fixed(2)))
    assert c.frozen is None


def test_misaligned_products_freeze():
    left, right = axes.product([Axis(6), Axis(4)]), axes.product([Axis(8), Axis(3)])
    axes.unify(left, right, "misaligned")
    assert all(axis.frozen == "misaligned" for axis in [*axes.leaves(left), *axes.leaves(right)])
