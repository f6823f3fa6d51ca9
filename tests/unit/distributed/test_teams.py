"""Matrices that are needed together have one owner and one bucket, under every sharding."""

import pytest
import torch

from hf_muon.commands.imaginary import Parameter, World, exchanges
from hf_muon.distributed.buckets import plan_buckets
from hf_muon.distributed.layout import Matrix
from hf_muon.distributed.owners import polar_cost

CPU = torch.device("cpu")
EXPERTS, RANK = 3, 4
# Pairs of adapter factors, with ranks that leave some members of a shard group without rows; and
# one pair per expert: rows of A, strided columns of B.
SHAPES = [(4, 40), (30, 4), (8, 24), (24, 8), (2, 16), (50, 2)] * 2
PARAMETERS = [Parameter(shape, (Matrix.whole(shape),)) for shape in SHAPES]
PARAMETERS += [
    Parameter((12, 20), tuple(Matrix(80 * e, (4, 20), (20, 1), 0) for e in range(EXPERTS))),
    Parameter((28, 12), tuple(Matrix(e, (28, 4), (12, 3), 0) for e in range(EXPERTS))),
]
TEAMS = [((index, 0), (index + 1, 0)) for index in range(0, 12, 2)]
TEAMS += [((12, e), (13, e)) for e in range(EXPERTS)]
LOOSE = Parameter((30, 30), (Matrix.whole((30, 30)),))
WORLDS = [World("ddp", 2), World("fsdp2", 3), World("hsdp", 4, 2), World("zero2", 2)]


def plan(world, together, limit=10**9, parameters=PARAMETERS):
    (layouts,) = exchanges(parameters, [True] * len(parameters), world)
    if len(layouts) == 1:  # a flat tensor: all matrices are of one parameter
        numbers = {(i, m): n for n, (i, m) in enumerate(places(parameters))}
        together = [tuple((0, numbers[place]) for place in team) for team in together]
    return plan_buckets(layouts, [CPU] * len(layouts), limit, together), together


def places(parameters):
    return [(i, m) for i, p in enumerate(parameters) for m in range(len(p.matrices))]


@pytest.mark.parametrize("limit", [10**9, 100])
@pytest.mark.parametrize("world", WORLDS, ids="{0.kind}".format)
def test_a_team_has_one_owner_and_follows_itself_in_one_bucket(world, limit):
    buckets, teams = plan(world, TEAMS, limit)
    found = []
    for bucket in buckets:
        for first, second in zip(bucket.units[::2], bucket.units[1::2], strict=True):
            assert first.owner == second.owner
            found.append(((first.parameter, first.matrix), (second.parameter, second.matrix)))
        for first, second in zip(bucket.mine[::2], bucket.mine[1::2], strict=True):
            assert ((first.parameter, first.matrix), (second.parameter, second.matrix)) in found
    assert sorted(found) == sorted(teams)
    assert (len(buckets) > 1) is (limit == 100)


@pytest.mark.parametrize("world", WORLDS[:3], ids="{0.kind}".format)  # flat parts hold both
def test_without_teams_owners_part(world):
    buckets, _ = plan(world, [])
    owner = {(u.parameter, u.matrix): u.owner for bucket in buckets for u in bucket.units}
    _, teams = plan(world, TEAMS)
    assert any(owner[first] != owner[second] for first, second in teams)


@pytest.mark.parametrize("world", WORLDS, ids="{0.kind}".format)
def test_work_is_shared_by_the_cost_of_teams(world):
    buckets, _ = plan(world, TEAMS)
    load = {}
    for bucket in buckets:
        for unit in bucket.units:
            load[unit.owner] = load.get(unit.owner, 0) + polar_cost(*unit.shape)
    ranks = world.mesh[0] * world.mesh[1]
    heaviest = max(polar_cost(8, 24) * 2, sum(load.values()) / ranks)
    assert max(load.values()) < 4 / 3 * heaviest  # longest first; Graham 1969


def test_teams_and_single_matrices_share_a_plan():
    buckets, _ = plan(World("fsdp2", 2), TEAMS, parameters=[*PARAMETERS, LOOSE])
    units = [(u.parameter, u.matrix) for bucket in buckets for u in bucket.units]
    assert sorted(units) == sorted(places([*PARAMETERS, LOOSE]))
    assert units[0] == (len(PARAMETERS), 0)  # the costliest
