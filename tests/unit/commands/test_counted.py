"""What is counted of a block is what torch would launch, move and wait for."""

import pytest
import torch

from hf_muon.commands.counted import ALLOCATION, CHUNK, counting, launches_of

BF16 = torch.bfloat16


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def simulated(sizes, lists):
    """Launches of multi_tensor_apply, chunk by chunk, as torch's loop goes."""
    most = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}[lists]
    launches = tensors = blocks = 0
    for size in sizes:
        if size == 0:
            continue
        tensors += 1
        chunks = -(-size // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            is_last = chunk == chunks - 1
            if (tensors == most and is_last) or blocks == 320:
                launches += 1
                blocks = 0
                tensors = 0 if is_last else 1
    return launches + (blocks > 0)


@pytest.mark.parametrize("lists", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [0, 0],
        [5] * 64,
        [5] * 65,
        [5] * 331,
        [CHUNK * 320],
        [CHUNK * 320 + 1],
        [CHUNK * 319, CHUNK * 2, 7],
        [CHUNK * 5 + 3, 0, 11] * 150,
    ],
)
def test_lists_are_cut_as_torch_cuts_them(sizes, lists):
    assert launches_of(sizes, lists) == simulated(sizes, lists)


def test_lists_cost_few_launches_and_lists_that_do_not_fit_one_for_each():
    weights = [meta(8, 8) for _ in range(70)]
    updates = [meta(8, 8) for _ in range(70)]
    with counting() as alike:
        torch._foreach_add_(weights, updates)
    mixed = [meta(8, 8, dtype=BF16) for _ in range(70)]
    with counting() as of_two_dtypes:
        torch._foreach_add_(weights, mixed)
    with counting() as strided:
        torch._foreach_add_(weights, [meta(16, 16)[::2, ::2] for _ in range(70)])
    with counting() as copied:
        torch._foreach_copy_(weights, mixed)
    assert (alike.operations, alike.launches, alike.listed) == (1, 2, 140)
    assert (of_two_dtypes.operations, of_two_dtypes.launches) == (1, 70)
    assert strided.by_name["_foreach_add_"] == 70
    assert copied.launches == 2
    assert alike.nbytes == 3 * 70 * 64 * 4
    assert copied.nbytes == 70 * 64 * (4 + 2)
    with counting() as norms:
        torch._foreach_norm(weights)
    assert norms.launches == 3  # zeros, partial sums, sums


def test_a_product_that_adds_to_another_matrix_copies_it_first():
    A, C, out = meta(40, 60, dtype=BF16), meta(40, 40, dtype=BF16), meta(40, 40, dtype=BF16)
    square = 40 * 40 * 2
    with counting() as plain:
        torch.mm(A, A.mT, out=out)
    with counting() as elsewhere:
        torch.addmm(C, A, A.mT, out=out)
    with counting() as in_place:
        C.addmm_(A, A.mT)
    with counting() as unused:
        torch.addmm(C, A, A.mT, beta=0.0, out=out)
    with counting() as strided:
        torch.mm(meta(80, 120, dtype=BF16)[::2, ::2], A.mT, out=out)
    assert (plain.launches, elsewhere.launches, in_place.launches) == (1, 2, 1)
    assert (unused.launches, strided.launches) == (1, 2)
    assert plain.flop == elsewhere.flop == 2 * 40 * 40 * 60
    assert plain.nbytes == 2 * 40 * 60 * 2 + square
    assert elsewhere.nbytes == plain.nbytes + square + 2 * square  # reads C; the copy
    assert all(work.in_half for work in plain.work)


def test_batches_count_as_one_launch_with_the_work_of_all():
    A = meta(7, 40, 60)
    with counting() as counts:
        torch.bmm(A, A.mT, out=meta(7, 40, 40))
    assert (counts.launches, counts.flop) == (1, 7 * 2 * 40 * 40 * 60)
    assert not any(work.in_half for work in counts.work)


def test_views_and_allocations_launch_nothing():
    x = meta(4, 6)
    with counting() as counts:
        x.mT, x[1:], x.view(-1), torch.empty_like(x), x.detach()
    assert (counts.launches, counts.nbytes) == (0, 0)
    assert counts.operations >= 5
    with counting() as counts:
        torch.zeros_like(x)
        x.clone()
    assert (counts.launches, counts.nbytes) == (2, 3 * 96)


def test_a_broadcast_operand_is_read_once():
    with counting() as counts:
        meta(1000, 1000).mul_(meta(1000, 1).expand(1000, 1000))
    assert counts.nbytes == 2 * 4_000_000 + 4000


def test_what_the_host_asks_is_answered_and_counted():
    x = meta(4)
    with counting() as counts:
        assert bool(x.norm() <= 2.0)
        assert float(x.sum()) == 1.0
        assert int(x.to(torch.int32).sum()) == 1
        assert x.cpu().tolist() == [1.0] * 4
        assert x.tolist() == [1.0] * 4
        torch.empty(4).copy_(x)
        x.copy_(torch.ones(4))
        x.copy_(torch.ones(4), non_blocking=True)
    assert counts.waits == 7
    assert counts.waited == {"_local_scalar_dense": 3, "_to_copy": 2, "copy_": 2}
    with counting() as free:
        x.mul_(2.0)
    assert free.waits == 0


def test_what_lies_elsewhere_is_not_counted():
    with counting() as counts:
        assert float(torch.ones(3).sum()) == 3.0
    assert (counts.operations, counts.waits, counts.peak) == (0, 0, 0)


def test_the_peak_is_of_what_is_there_at_one_time():
    size = 256 * 256 * 4
    with counting() as after_another:
        for _ in range(3):
            one = meta(256, 256)
            del one
    with counting() as together:
        kept = [meta(256, 256) for _ in range(3)]
    with counting() as tiny:
        kept.append(meta(1))
    assert after_another.peak == size
    assert together.peak == 3 * size
    assert tiny.peak == ALLOCATION


def test_torch_takes_lists_as_before_afterwards():
    x = [meta(3)]
    with counting() as counts:
        torch.nn.utils.get_total_norm(x)
    assert counts.by_name["_foreach_norm"] > 0
    assert not torch.utils._foreach_utils._has_foreach_support(x, x[0].device)


def test_counts_add_up():
    with counting() as first:
        one = meta(300)
        one.add_(1.0)
    with counting() as second:
        bool(one.sum())
    both = first + second
    assert both.operations == first.operations + second.operations
    assert both.launches == 2
    assert both.waits == 1
    assert both.peak == max(first.peak, second.peak)
    assert both.nbytes == first.nbytes + second.nbytes


def test_a_kernel_of_ones_own_is_one_launch_and_half_the_work():
    library = torch.library.Library("counted_by_a_test", "DEF")
    library.define(
        "product(Tensor A, Tensor B, Tensor? C, float beta, float alpha, bool symmetric, "
        "Tensor(a!) out) -> ()"
    )
    library.impl("product", lambda *_: None, "Meta")
    A, C, out = meta(3, 40, 60, dtype=BF16), meta(3, 40, 40, dtype=BF16), meta(3, 40, 40)
    for symmetric, given in ((True, C), (False, None)):
        with counting() as counts:
            torch.ops.counted_by_a_test.product(A, A.mT, given, 0.5, 1.0, symmetric, out)
        assert counts.launches == 1
        assert counts.flop == (1 if symmetric else 2) * 3 * 40 * 40 * 60
        sizes = 2 * A.nbytes + out.nbytes + (C.nbytes if symmetric else 0)
        assert counts.nbytes == sizes
