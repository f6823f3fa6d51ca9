"""What lies on the host is computed elsewhere with the same bits, and crosses once each way."""

from collections import Counter

import pytest
import torch

from hf_muon.distributed.offload import fetched, staged
from hf_muon.optimizer import entries
from hf_muon.polar import devices
from tests.elsewhere import CROSSED, DEVICE, elsewhere
from tests.every_rule import PAIRS, RULES, run_of

CPU = torch.device("cpu")
SHAPES = [(3, 5), (1, 7), (6, 4)]


def crossed(way):
    return [one.numel for one in CROSSED if one.way == way]


def blocks_of(dtype=torch.float32):
    """Views of one matrix that do not lie side by side, as the pieces of a whole matrix do."""
    whole = torch.zeros(8, 24, dtype=dtype, device=DEVICE)
    return [whole[:3, 2:7], whole[4:5, :7], whole[2:8, 20:24]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_staged_arrives_in_one_copy_rounded_as_by_a_copy_of_each(dtype):
    numbers = [torch.randn(shape) for shape in SHAPES]
    with elsewhere():
        places = blocks_of(dtype)
        with staged(places, CPU) as here:
            assert all(isinstance(one, torch.Tensor) and one.is_cpu for one in here)
            torch._foreach_copy_(here, numbers)
            assert not crossed("there")
        assert crossed("there") == [15 + 7 + 24]
        assert not CROSSED[0].blocks  # the host goes on
        for place, number in zip(places, numbers, strict=True):
            one_by_one = torch.zeros(number.shape, dtype=dtype, device=DEVICE)
            one_by_one.copy_(number)
            assert torch.equal(place.to("cpu"), one_by_one.to("cpu"))
            assert not torch.equal(place.to("cpu"), torch.zeros_like(number, dtype=dtype))


def test_what_is_fetched_crosses_in_one_copy():
    with elsewhere():
        blocks = blocks_of()
        for number, block in enumerate(blocks):
            block.fill_(number + 1)
        CROSSED.clear()
        found = fetched(blocks, CPU)
        assert crossed("back") == [15 + 7 + 24]
    for number, (one, shape) in enumerate(zip(found, SHAPES, strict=True)):
        assert one.is_cpu
        assert torch.equal(one, torch.full(shape, number + 1.0))


def test_the_host_waits_once_for_what_comes_through_pinned_memory(monkeypatch):
    happened = []

    class Event:
        def __init__(self, device):
            assert device == DEVICE

        def record(self):
            happened.append(("recorded", crossed("back")))

        def synchronize(self):
            happened.append("waited")

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    monkeypatch.setattr(torch, "Event", Event)
    with elsewhere():
        fetched(blocks_of(), CPU)
        assert not CROSSED[0].blocks
    assert happened == [("recorded", [15 + 7 + 24]), "waited"]


def test_what_is_not_offloaded_is_not_copied():
    blocks = [torch.randn(shape) for shape in SHAPES]
    with staged(blocks, CPU) as here:
        assert here is blocks
    assert fetched(blocks, CPU) is blocks


def test_a_rank_may_hold_nothing():
    assert fetched([], CPU) == []
    with staged([], CPU) as here:
        assert here == []


# --- steps ---------------------------------------------------------------------------------------

OTHER = {
    **dict.fromkeys(("default", "auto", "without zeros"), "rows"),
    "product": "tangent",
    "tangent": "product",
}


def trained(name, monkeypatch, there, copies=1):
    """Whole weights after three steps, and what crossed in the last, by way."""
    optimizer, weights, given = run_of(name, copies)
    monkeypatch.setattr(entries, "compute_device", lambda *_: there)
    monkeypatch.setattr(devices, "is_cpu", lambda device: False)  # the same kernels on both
    with elsewhere():
        for step in given:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            CROSSED.clear()
            optimizer.step()
        counts = Counter(one.way for one in CROSSED)
    buckets = [b for plan in optimizer._plans._plans.values() for b in plan.buckets]
    assert {bucket.device for bucket in buckets} == {there}
    return [weight.detach().clone() for weight in weights], counts, len(buckets)


@pytest.mark.parametrize("name", [*RULES, *PAIRS])
def test_offloaded_matrices_move_by_the_same_bits(name, monkeypatch):
    here, none, _ = trained(name, monkeypatch, CPU)
    other, _, _ = trained(OTHER.get(name, "default"), monkeypatch, DEVICE)
    there, some, _ = trained(name, monkeypatch, DEVICE)
    assert all(map(torch.equal, here, there))
    assert not any(map(torch.equal, other, there))
    assert not none
    assert some["there"]
    assert some["back"]


@pytest.mark.parametrize("name", RULES)
def test_more_matrices_make_no_more_copies(name, monkeypatch):
    _, few, buckets = trained(name, monkeypatch, DEVICE)
    _, many, more = trained(name, monkeypatch, DEVICE, copies=3)
    assert (buckets, more) == (1, 1)
    for counts in (few, many):
        assert counts["there"] == 1
        # What owners measure of whole results comes back beside them.
        assert counts["back"] == (2 if name == "rows" else 1)
