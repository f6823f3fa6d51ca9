"""Owners balance the work, and keep what costs no message where balance allows."""

from hf_muon.distributed.owners import assign_owners


def loads(costs, owners, slots):
    return [
        sum(c for c, o in zip(costs, owners, strict=True) if o == slot) for slot in range(slots)
    ]


def test_the_longest_go_first_to_the_lightest():
    costs = [5, 4, 3, 3, 3]
    owners = assign_owners(costs, [range(2)] * 5, [None] * 5, 2)
    assert owners == [0, 1, 1, 0, 1]
    assert loads(costs, owners, 2) == [8, 10]


def test_only_candidates_own():
    assert assign_owners([3, 2, 1], [[1], [1], [0, 1]], [None] * 3, 2) == [1, 1, 0]


def test_a_holder_owns_while_its_load_stays_near_the_mean():
    even = assign_owners([1] * 8, [range(2)] * 8, [0] * 4 + [1] * 4, 2)
    assert even == [0] * 4 + [1] * 4
    uneven = assign_owners([1] * 8, [range(2)] * 8, [0] * 6 + [1] * 2, 2)
    assert loads([1] * 8, uneven, 2) == [4, 4]
    assert uneven[:4] == [0] * 4


def test_one_large_matrix_stays_with_its_holder():
    assert assign_owners([10, 1], [range(4)] * 2, [2, 2], 4) == [2, 0]
