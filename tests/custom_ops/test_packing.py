"""The packed layout, against the sentence in docs/ops.md that defines it."""

from __future__ import annotations

import numpy as np
import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import (
    pack_group_scales,
    pack_int4,
    segment_length,
    unpack_group_scales,
    unpack_int4,
)

SHAPES = [(1, 1), (8, 16), (24, 40), (13, 17), (7, 50), (576, 33)]


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_unpacking_undoes_packing(rng: np.random.Generator, n: int, m: int) -> None:
    q = rng.integers(-8, 8, (n, m), dtype=np.int8)
    packed = pack_int4(q)
    assert packed.shape == (-(-m // 16), -(-n // 8), 64)
    assert packed.dtype == np.int8
    np.testing.assert_array_equal(unpack_int4(packed, n, m), q)


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_byte_is_where_the_layout_says(rng: np.random.Generator, n: int, m: int) -> None:
    q = rng.integers(-8, 8, (n, m), dtype=np.int8)
    packed = pack_int4(q).view(np.uint8)

    def nibble(feature: int, output: int) -> int:
        return int(q[feature, output]) + 8 if feature < n and output < m else 8

    for _ in range(200):
        p, k, lane, j = (int(rng.integers(size)) for size in (*packed.shape[:2], 16, 4))
        byte = packed[p, k, 4 * lane + j]
        assert byte & 15 == nibble(8 * k + j, 16 * p + lane)
        assert byte >> 4 == nibble(8 * k + 4 + j, 16 * p + lane)


@pytest.mark.parametrize(
    "q",
    [
        np.full((8, 16), 8, np.int8),
        np.full((8, 16), -9, np.int8),
        np.full((8, 16), 3, np.int32),
        np.full(16, 3, np.int8),
        np.empty((0, 16), np.int8),
    ],
)
def test_packing_refuses_what_is_not_int4(q: np.ndarray) -> None:
    with pytest.raises(SpecQuantError, match=r"\A[^\n]+\Z"):
        pack_int4(q)


@pytest.mark.parametrize(("n", "m"), [(25, 40), (24, 49), (24, 16), (0, 40)])
def test_unpacking_refuses_other_sizes(rng: np.random.Generator, n: int, m: int) -> None:
    packed = pack_int4(rng.integers(-8, 8, (24, 40), dtype=np.int8))
    with pytest.raises(SpecQuantError, match="export the model again"):
        unpack_int4(packed, n, m)


GROUPS = [(1, 1), (3, 16), (9, 40), (2, 17), (7, 50), (64, 33)]


@pytest.mark.parametrize(("groups", "m"), GROUPS)
def test_unpacking_undoes_packing_of_group_scales(rng: np.random.Generator, groups: int, m: int) -> None:
    scales = rng.integers(1, 17, (groups, m), dtype=np.int8)
    packed = pack_group_scales(scales)
    assert packed.shape == (-(-m // 16), groups, 8)
    assert packed.dtype == np.int8
    np.testing.assert_array_equal(unpack_group_scales(packed, groups, m), scales)


@pytest.mark.parametrize(("groups", "m"), GROUPS)
def test_every_nibble_of_group_scales_is_where_the_layout_says(rng: np.random.Generator, groups: int, m: int) -> None:
    scales = rng.integers(1, 17, (groups, m), dtype=np.int8)
    for p, panel in enumerate(pack_group_scales(scales)):
        for g, eight in enumerate(panel):
            words = np.frombuffer(eight.tobytes(), "<u4")
            for lane in range(16):
                nibble = int(words[lane % 2]) >> 4 * (lane // 2) & 15
                assert nibble == (scales[g, 16 * p + lane] - 1 if 16 * p + lane < m else 0)


@pytest.mark.parametrize(
    "scales",
    [
        np.full((3, 16), 0, np.int8),
        np.full((3, 16), 17, np.int8),
        np.full((3, 16), 3, np.uint8),
        np.full(16, 3, np.int8),
        np.empty((0, 16), np.int8),
    ],
)
def test_packing_refuses_what_are_not_group_scales(scales: np.ndarray) -> None:
    with pytest.raises(SpecQuantError, match=r"\A[^\n]+\Z"):
        pack_group_scales(scales)


@pytest.mark.parametrize(("groups", "m"), [(4, 40), (3, 49), (3, 16), (0, 40), (3, 0)])
def test_unpacking_refuses_other_sizes_of_group_scales(rng: np.random.Generator, groups: int, m: int) -> None:
    packed = pack_group_scales(rng.integers(1, 17, (3, 40), dtype=np.int8))
    with pytest.raises(SpecQuantError, match="export the model again"):
        unpack_group_scales(packed, groups, m)


@pytest.mark.parametrize(
    ("n", "group_size", "act_group", "segment"),
    [(96, 0, 0, 96), (96, 32, 0, 32), (96, 0, 48, 48), (96, 16, 48, 16), (96, 48, 16, 16), (13, 0, 0, 13)],
)
def test_a_segment_is_the_smaller_group(n: int, group_size: int, act_group: int, segment: int) -> None:
    assert segment_length(n, group_size, act_group) == segment


@pytest.mark.parametrize(
    ("n", "group_size", "act_group"), [(96, 12, 0), (96, 0, 64), (96, 48, 32), (96, -8, 0), (13, 13, 0)]
)
def test_groups_that_do_not_fit_are_refused(n: int, group_size: int, act_group: int) -> None:
    with pytest.raises(SpecQuantError, match=r"\A[^\n]+\Z"):
        segment_length(n, group_size, act_group)
