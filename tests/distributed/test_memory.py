"""A step takes memory for the buckets in flight, not for the model."""

import pytest
import torch

from tests.distributed import memory
from tests.distributed.launch import launch

# One more than the collectives of a bucket.
IN_FLIGHT = {"ddp": 2, "fsdp": 3}
# What a bucket takes at most, in whole matrices of one owner, on two ranks: the factors, what is
# sent, what is received of both, and the copy of it that gloo makes while it gathers.
PER_BUCKET = 1 + 1 + 2 + 2
# The filtered gradient and the iteration: a matrix, its successor, and products of them.
WORKSPACE = 10


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_peak_memory_is_bounded_by_the_buckets(kind, tmp_path):
    launch("memory", 2, kind, tmp_path / "out.pt")
    peaks = torch.load(tmp_path / "out.pt")
    for matrices, peak in peaks.items():
        bound = IN_FLIGHT[kind] * PER_BUCKET * matrices + WORKSPACE
        assert peak <= bound * memory.MATRIX_BYTES, matrices
    small, large = memory.MATRICES_PER_BUCKET
    # All matrices together would take more, and larger buckets do.
    assert peaks[small] < memory.COUNT * memory.MATRIX_BYTES
    assert peaks[large] > 1.5 * peaks[small]
