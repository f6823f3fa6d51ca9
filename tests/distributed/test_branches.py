"""Parameters that only some ranks use train as in one process, and those that none uses stay."""

import torch

from tests.distributed import branches
from tests.distributed.launch import launch
from tests.integration.tiny import largest_difference


def test_replicas_stay_equal_whatever_each_rank_uses(tmp_path):
    launch("branches", 2, tmp_path / "out.pt")
    results = torch.load(tmp_path / "out.pt")
    mine, others = results["weights"]
    assert largest_difference(mine, others) == 0

    model, _, optimizer = branches.build()
    for step in range(branches.STEPS):
        loss = sum(model(*branches.data(step, rank)) for rank in range(2)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # A sum of two gradients in another order: float32 rounding.
    assert largest_difference(mine, dict(model.named_parameters())) < 1e-6

    start = branches.Branches()
    assert torch.equal(mine["unused.weight"], start.unused.weight)
    assert torch.equal(mine["frozen.weight"], start.frozen.weight)
    assert not torch.equal(mine["experts.1.weight"], start.experts[1].weight)
    # The second expert has a gradient on the second rank in every other step.
    assert results["steps"]["experts.0.weight"] == 4
    assert results["steps"]["experts.1.weight"] == 2
    assert results["steps"]["unused.weight"] == 0
