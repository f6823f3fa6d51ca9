"""Ranks agree on which gradients exist and whether all are finite, before anything is written."""

import pytest
import torch

from tests.distributed import layouts
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients") / "results.pt"
    launch("gradients", 2, out)
    return torch.load(out)


def test_a_gradient_that_one_rank_lacks_counts_as_zero_there(results):
    model, _ = layouts.build("none")
    optimizer = layouts.build_optimizer(model)
    layouts.set_gradients(model, 0, skip=("down",))
    parameters = dict(model.named_parameters())
    for name in ("up", "embedding"):  # the second rank holds the second half of the rows
        rows = -(-len(parameters[name]) // 2)
        parameters[name].grad[rows:] = 0
    optimizer.step()
    for name, p in parameters.items():
        assert torch.equal(results["missing"][name], p), name
    assert results["steps"] == {name: int(name != "down") for name in parameters}


def test_a_gradient_that_all_ranks_lack_leaves_the_parameter_alone(results):
    start = dict(layouts.Model().named_parameters())
    assert torch.equal(results["missing"]["down"], start["down"])
    assert not torch.equal(results["missing"]["up"], start["up"])


def test_a_bad_gradient_on_one_rank_stops_all_and_changes_nothing(results):
    mine, others = results["messages"]
    assert "Another rank has a gradient" in mine
    assert "in q" in others
    for name, weight in results["missing"].items():
        assert torch.equal(results["after"][name], weight), name


def test_a_norm_that_overflows_on_one_rank_stops_none_where_every_entry_can_be_used(results):
    assert all(torch.isfinite(weight).all() for weight in results["large"].values())
    assert not torch.equal(results["large"]["q"], results["after"]["q"])


def test_state_that_was_loaded_before_sharding_is_refused(results):
    assert "momentum of q is a Tensor and the parameter a DTensor" in results["state"]
