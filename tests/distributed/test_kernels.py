"""Flattened kernels are trained alike however they are sharded, for given gradients."""

import torch

from tests.distributed import kernels, layouts
from tests.distributed.launch import launch


def test_kernels_on_two_ranks_are_those_of_one(tmp_path):
    launch("kernels", 2, tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt")
    expected, before = (layouts.full_weights(m) for m in (kernels.train("none"), kernels.Model()))
    for kind in ("ddp", "fsdp"):
        assert results[kind, "sharded"] is (kind == "fsdp")
        for name, weight in results[kind].items():
            assert torch.equal(weight, expected[name]), (kind, name)
            assert not torch.equal(weight, before[name]), name
