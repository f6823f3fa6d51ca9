"""Counts, sizes and shapes as a person reads them."""

import pytest

from hf_muon.shown import count, megabytes, shape


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (1_000, "1.00 k"), (33_408, "33.4 k"),
        (106_496, "106 k"), (999_499, "999 k"), (999_500, "1.00 M"), (999_999, "1.00 M"),
        (9_994_999, "9.99 M"), (9_995_000, "10.0 M"), (6_738_415_616, "6.74 B"),
        (2 * 10**15, "2000 T"),
    ],
)  # fmt: skip
def test_counts_have_three_digits(number, text):
    assert count(number) == text


def test_sizes_are_in_megabytes_and_shapes_have_a_cross():
    assert [megabytes(n) for n in (0, 61_440, 7_400_000, 99_950_000, 1_710_000_000)] == [
        "0 MB", "0.0614 MB", "7.4 MB", "100 MB", "1,710 MB",
    ]  # fmt: skip
    assert [shape(s) for s in ((256, 344), (8,), ())] == ["256 × 344", "8", "1"]
