"""Uneven slices and tilted stacks: on functions that linear interpolation renders exactly."""

import numpy as np
import pytest

from med3dvlm.data.geometry import GeometryError, canonical_turn, resample_slices, shear_slices, slice_grid


def ramp(k, j, i):
    """Linear in space, so that interpolating it anywhere is exact."""
    return 2.0 * k - 3.0 * j + 0.5 * i


@pytest.mark.parametrize(
    "positions, even",
    [
        ([0, 1, 2, 3], True),
        ([0, 1.09, 2, 3], True),  # within 0.1 mm
        ([0, 1.11, 2, 3], False),  # one slice is out of place; a grid 0.055 mm to the side is not that of the others
        ([0.11, 1, 2, 3, 4, 5], False),
        ([0, 1, 2, 3, 4, 5.11], False),
        ([*range(150), 150.11, *range(151, 300)], False),
        ([0.09, 1, 2, 3, 4, 5], True),
        ([0.09, 0.91, 2.09, 2.91, 4.09, 4.91], True),
        ([0, 10.19, 20, 30], True),  # within 2% of the spacing
        ([0, 10.21, 20, 30], False),
        ([0, 1.4, 2.4, 3.4, 4.4], False),
        ([0, 0.3, 0.6, 0.9, 1.5, 1.8, 2.1, 2.4], False),  # one is missing, though all lie within 0.1 mm of a grid
        ([-5, -3, -1, 3, 5], False),  # a slice is missing
        ([0, 2.5], True),
    ],
)
def test_even_and_uneven_positions(positions, even):
    assert slice_grid(positions).even is even


@pytest.mark.parametrize("spacing, tolerance", [(1.0, 0.1), (2.0, 0.1), (5.0, 0.1), (10.0, 0.2)])
def test_what_lies_within_the_tolerance_of_a_uniform_grid_is_even(spacing, tolerance):
    rng = np.random.default_rng(0)
    for count in (3, 12, 200):
        grid = spacing * np.arange(count) + rng.uniform(-50, 50)
        for _ in range(50):
            assert slice_grid(grid + rng.uniform(-tolerance, tolerance, count)).even
        assert slice_grid(grid + tolerance * rng.choice([-1, 1], count)).even


@pytest.mark.parametrize("count", [3, 5, 8])
def test_the_deviation_is_that_of_the_best_grid(count):
    positions = np.cumsum(np.random.default_rng(count).uniform(1, 3, count))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]  # the best grid is parallel to one of these
    slopes = [(positions[b] - positions[a]) / (b - a) for a, b in pairs]
    best = min(np.ptp(positions - slope * np.arange(count)) / 2 for slope in slopes)
    assert slice_grid(positions).deviation == pytest.approx(best, abs=1e-9)


def test_the_gap_is_known():
    grid = slice_grid([-5, -3, -1, 3, 5])
    assert (grid.spacing, grid.gap, grid.gap_after) == (2, 4, 2)
    assert slice_grid([0, 1.5, 3.0]).spacing == 1.5
    for wrong in ([1.0], [0, 0, 1], [2, 1, 0], [0, np.nan, 2]):
        with pytest.raises(GeometryError, match="increasing"):
            slice_grid(wrong)


@pytest.mark.parametrize("positions", [[0, 2, 4, 8, 10], [0, 0.7, 2, 2.9, 4], [-3, -1, 6]])
def test_uneven_slices_become_a_uniform_grid(positions):
    j, i = np.meshgrid(np.arange(4), np.arange(5), indexing="ij")
    array = np.stack([ramp(p, j, i) for p in positions]).astype(np.float32)
    result, spacing = resample_slices(array, positions)
    at = positions[0] + spacing * np.arange(len(result))
    assert at[-1] == pytest.approx(positions[-1]) and result.dtype == np.float32
    assert np.allclose(result, np.stack([ramp(p, j, i) for p in at]), atol=1e-5)
    assert slice_grid(at).even


def test_even_slices_stay_as_they_are():
    array = np.random.default_rng(0).integers(-1000, 1000, (5, 3, 4)).astype(np.int16)
    result, spacing = resample_slices(array, [0, 2, 4, 6, 8])
    assert spacing == 2 and np.array_equal(result, array)


@pytest.mark.parametrize("step_j, step_i", [(0.0, 0.0), (1.0, 0.0), (0.3, 0.0), (-0.7, 0.0), (0.4, -1.25)])
def test_tilted_stack_is_sheared_straight(step_j, step_i):
    slices, height, width = 5, 8, 9
    k, j, i = np.meshgrid(np.arange(slices), np.arange(height), np.arange(width), indexing="ij")
    rows, columns = step_j * np.arange(slices), step_i * np.arange(slices)
    # voxel (j, i) of slice k lies at (j + rows[k], i + columns[k])
    array = ramp(k, j + rows[k], i + columns[k]).astype(np.float32)
    result, (row, column) = shear_slices(array, rows, columns)
    for n in range(slices):
        j, i = np.meshgrid(np.arange(result.shape[1]) + row, np.arange(result.shape[2]) + column, indexing="ij")
        inside = (j >= rows[n]) & (j <= rows[n] + height - 1) & (i >= columns[n]) & (i <= columns[n] + width - 1)
        assert np.allclose(result[n][inside], ramp(n, j, i)[inside], atol=1e-4)
        outside = (j <= rows[n] - 1) | (j >= rows[n] + height) | (i <= columns[n] - 1) | (i >= columns[n] + width)
        assert (result[n][outside] == array.min()).all()
        assert inside.sum() >= (height - 1) * (width - 1)  # nothing of a slice is cut off


def test_flat_and_broken_affines_have_no_turn():
    for affine in (np.diag([1.0, 1, 0, 1]), np.diag([1.0, np.nan, 1, 1]), np.diag([1.0, np.inf, 1, 1])):
        assert canonical_turn(affine) is None
    flat = np.eye(4)
    flat[:3, 2] = flat[:3, 0]
    assert canonical_turn(flat) is None
