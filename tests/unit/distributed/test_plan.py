"""The plan of ranks that do not exist is the plan that they would make, and it is balanced."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_muon import Muon
from hf_muon.commands.costs import bucket_costs
from hf_muon.commands.imaginary import Parameter, World, _rows_of_a_mesh, exchanges
from hf_muon.commands.plan import forecast
from hf_muon.config import MuonConfig
from hf_muon.distributed.buckets import plan_buckets
from hf_muon.distributed.dtensor import dtensor_layout
from hf_muon.distributed.layout import Matrix
from hf_muon.distributed.owners import polar_cost
from scripts.scaling_table import MODELS, Llama
from tests.reference.makespan import smallest_makespan

# Uneven rows, empty shards, a stack of experts, blocks of rows and of columns, a single row.
PARAMETERS = [
    Parameter((13, 6), (Matrix.whole((13, 6)),)),
    Parameter((3, 8), (Matrix.whole((3, 8)),)),
    Parameter((5, 4, 6), tuple(Matrix(24 * e, (4, 6), (6, 1), 0) for e in range(5))),
    Parameter((9, 4), (Matrix(0, (5, 4), (4, 1), 0), Matrix(20, (4, 4), (4, 1), 0))),
    Parameter((6, 9), tuple(Matrix(3 * i, (6, 3), (9, 1), 1) for i in range(3))),
    Parameter((1, 20), (Matrix.whole((1, 20)),)),
]
CPU = torch.device("cpu")
WORLDS = [
    World("ddp", 3),
    World("fsdp2", 4),
    World("hsdp", 6, replicas=3),
    World("zero1", 3),
    World("zero3", 4),
]
ids = "{0.kind} {0.ranks}".format


def buckets_of(parameters, world, limit=10**9, shares=True):
    layouts = exchanges(parameters, [shares] * len(parameters), world)
    return [b for part in layouts for b in plan_buckets(part, [CPU] * len(part), limit)]


@pytest.fixture
def mesh(request):
    """A device mesh of ranks of which this process is the first and the others do not exist."""
    sizes = request.param
    dist.init_process_group("fake", rank=0, world_size=torch.Size(sizes).numel(), store=FakeStore())
    yield init_device_mesh("cpu", sizes)
    dist.destroy_process_group()


@pytest.mark.parametrize("mesh", [(2,), (3,), (7,), (2, 3), (3, 2)], indirect=True, ids=str)
def test_layouts_are_those_of_dtensors(mesh):
    replicas, shards = mesh.shape if mesh.ndim == 2 else (1, *mesh.shape)
    world = World("hsdp", replicas * shards, replicas) if replicas > 1 else World("fsdp2", shards)
    placements = [Replicate(), Shard(0)][-mesh.ndim :]
    ours = exchanges(PARAMETERS, [True] * len(PARAMETERS), world)[0]
    for parameter, layout in zip(PARAMETERS, ours, strict=True):
        tensor = distribute_tensor(torch.zeros(parameter.shape), mesh, placements)
        assert layout == dtensor_layout(tensor, parameter.matrices, "weight")
        columns = distribute_tensor(torch.zeros(parameter.shape), mesh, [*placements[1:], Shard(1)])
        assert layout != dtensor_layout(columns, parameter.matrices, "weight")


@pytest.mark.parametrize("mesh", [(2, 3)], indirect=True, ids=str)
def test_layouts_and_steps_are_the_same_under_another_default_device(mesh):
    def found():
        _rows_of_a_mesh.cache_clear()
        layouts = [exchanges(PARAMETERS, [True] * len(PARAMETERS), world) for world in WORLDS]
        return [*layouts, [dtensor_layout(sharded, p.matrices, "weight") for p in PARAMETERS[:1]]]

    def trained():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(12, 8, device="cpu"))
        weight.grad = torch.randn_like(weight)
        Muon([weight], lr=0.1, distribute="redundant").step()
        return weight

    sharded = distribute_tensor(torch.zeros(13, 6), mesh, [Replicate(), Shard(0)])
    layouts, weight = found(), trained()
    with torch.device("meta"):
        assert found() == layouts
        assert torch.equal(trained(), weight)


@pytest.mark.parametrize("world", WORLDS, ids=ids)
@pytest.mark.parametrize("shares", [True, False], ids=["shared", "redundant"])
def test_every_copy_holds_every_element_once(world, shares):
    for part in exchanges(PARAMETERS, [shares] * len(PARAMETERS), world):
        for layout in part:
            for number, (rows, cols) in enumerate(layout.shapes):
                covered = torch.zeros(rows, cols)
                for member in layout.pieces:
                    for piece in member[number]:
                        piece.of_matrix(covered).add_(1)
                assert (covered == 1).all()


def test_flat_partitions_are_equal_and_padded_at_the_end():
    # 13 + 3 elements on 3 ranks: 18, the next multiple of 2 x 3, in parts of 6.
    rows = [Parameter((1, n), (Matrix.whole((1, n)),)) for n in (13, 3)]
    ((layout,),) = exchanges(rows, [True, True], World("zero2", 3))
    held = [[sum(p.numel for p in pieces) for pieces in member] for member in layout.pieces]
    assert held == [[6, 0], [6, 0], [1, 3]]
    assert [p.offset for p in layout.pieces[2][1]] == [1]


def test_zero3_steps_through_sub_groups(monkeypatch):
    monkeypatch.setattr("hf_muon.commands.imaginary.SUB_GROUP_SIZE", 45)
    parts = exchanges(PARAMETERS, [True] * len(PARAMETERS), World("zero3", 2))
    # Elements per rank: 39 + 12, 60, 18 + 27, 10.
    assert [len(layout.shapes) for (layout,) in parts] == [2, 5, 2 + 3, 1]


@pytest.mark.parametrize("limit", [10**9, 60])
@pytest.mark.parametrize("world", WORLDS, ids=ids)
def test_costs_are_what_each_rank_reads_from_its_own_copy_of_the_plan(world, limit):
    for bucket in buckets_of(PARAMETERS, world, limit):
        costs = bucket_costs(bucket, world.mesh, itemsize=2)
        assert len(costs) == world.ranks
        for rank, cost in enumerate(costs):
            replica, member = divmod(rank, world.mesh[1])
            own = dataclasses.replace(
                bucket,
                shard=dataclasses.replace(bucket.shard, index=member),
                replicate=dataclasses.replace(bucket.replicate, index=replica),
            )
            assert cost.matrices == len(own.mine)
            assert cost.operations == sum(polar_cost(*unit.shape) for unit in own.mine)
            gathered, scattered = elements(own.outgoing), elements(own.incoming)
            assert cost.exchanged == 2 * (sum(gathered) + sum(scattered))
            contribution = max(elements(own.by_replica))
            copies = own.replicate.size - 1
            assert cost.replicated == 2 * copies * contribution
            assert cost.collectives == 2 * own.gathers + (copies > 0 and contribution > 0)


def elements(lists):
    return [sum(piece.numel for _, piece in items) for items in lists]


def test_ranks_that_share_no_work_each_do_all_of_it():
    costs = bucket_costs(*buckets_of(PARAMETERS, World("ddp", 3), shares=False), (3, 1), 4)
    assert {cost.sent for cost in costs} == {0}
    assert [cost.matrices for cost in costs] == [13] * 3


TINY = Llama(64, 192, 4, 64).parameters()  # rows that 2 and 4 divide
P = sum(parameter.numel for parameter in TINY)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_and_collectives_follow_the_formulas(ranks):
    config, b = MuonConfig(bucket_mb=0.01, distribute="owner"), 2
    buckets = Counter()

    def of(kind, replicas=None):
        world = World(kind, ranks, replicas)
        limit = int(config.bucket_mb * 2**20 / b)
        buckets[kind] = len(buckets_of(TINY, world, limit))
        return forecast([TINY], config, world).ranks

    # FSDP2: 2 P b (N-1)/N², exact on average where the rows divide evenly; 2K collectives.
    costs = of("fsdp2")
    assert sum(c.sent for c in costs) * ranks == 2 * P * b * (ranks - 1)
    assert {c.collectives for c in costs} == {2 * buckets["fsdp2"]}

    # DDP: P b (N-1)/N plus the padding of each bucket to its largest share; K collectives.
    costs = of("ddp")
    assert {c.collectives for c in costs} == {buckets["ddp"]}
    for cost in costs:
        assert 1 <= cost.sent / (P * b * (ranks - 1) / ranks) <= PADDING

    # HSDP: 2 P b (S-1)/(R S²) + P b (R-1)/(R S), the second part padded; 3K collectives.
    replicas, shards = 2, ranks // 2
    costs = of("hsdp", replicas)
    assert sum(c.exchanged for c in costs) * shards == 2 * P * b * (shards - 1)
    assert {c.collectives for c in costs} == {(1 + 2 * (shards > 1)) * buckets["hsdp"]}
    for cost in costs:
        assert 1 <= cost.replicated / (P * b * (replicas - 1) / ranks) <= PADDING


# Ranks own unequal shares of a bucket, and the all-gather pads to the largest: 5 to 25 % in the
# runs of the design, more where a bucket holds fewer matrices than ranks.
PADDING = 1.25


def balance(name, ranks, kind="fsdp2"):
    return forecast([MODELS[name].parameters()], MuonConfig(), World(kind, ranks))


ROUND_NUMBERS = [8, 16, 24, 32, 48, 64]


@pytest.mark.parametrize("name", ["130M", "350M", "1B", "7B", "70B"])
def test_work_is_balanced_where_matrices_are_twice_the_ranks(name):
    for ranks in ROUND_NUMBERS:
        if len(MODELS[name].parameters()) >= 2 * ranks:
            assert balance(name, ranks).balance <= 1.1, ranks


SCALES = [(name, ranks) for name in MODELS for ranks in (8, 64, 512)] + [("70B", 1024)]


@pytest.mark.parametrize(("name", "ranks"), SCALES)
def test_no_rank_works_much_longer_than_the_longest_matrix_or_the_mean(name, ranks):
    costs = balance(name, ranks)
    assert costs.balance <= 1.1 * costs.lower_bound
    assert costs.idle == max(0, ranks - len(MODELS[name].parameters()))


@pytest.mark.parametrize("name", ["60M", "130M", "7B"])
def test_no_assignment_is_much_better_on_any_number_of_ranks(name):
    """Where few matrices fall on each rank, the mean is out of reach for every assignment."""
    work = Counter(polar_cost(*parameter.shape) for parameter in MODELS[name].parameters())
    small, large = sorted(work.items())
    for ranks in range(8, 65, 4):
        costs = balance(name, ranks)
        most = max(cost.operations for cost in costs.ranks)
        assert most <= 1.05 * smallest_makespan(ranks, large, small), ranks


def test_the_balance_can_be_missed():
    """In turn, without a look at the work, the matrices of a 7B model are 1.4 times off."""
    loads = [0] * 64
    for turn, parameter in enumerate(MODELS["7B"].parameters()):
        loads[turn % 64] += polar_cost(*parameter.shape)
    assert max(loads) * 64 > 1.4 * sum(loads)
    assert sum(loads) == sum(cost.operations for cost in balance("7B", 64).ranks)


def test_more_memory_is_held_where_buckets_are_larger():
    small, large = (
        forecast([TINY], MuonConfig(bucket_mb=size), World("fsdp2", 2)).ranks[0].memory
        for size in (0.01, 1)
    )
    assert small < large


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fsdp", 2), "'fsdp' is not one of 'ddp', 'fsdp2'"),
        (("ddp", 0), "ranks=0"),
        (("hsdp", 4), "needs replicas"),
        (("hsdp", 4, 3), "replicas=3 does not divide ranks=4"),
        (("ddp", 4, 2), "only for hsdp"),
    ],
)
def test_impossible_worlds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        World(*arguments)


def test_rates_devices_and_models_are_checked():
    with pytest.raises(ValueError, match="tflops=0"):
        forecast([TINY], MuonConfig(), World("ddp", 2)).to_dict(0, 50)
    with pytest.raises(ValueError, match="'tpu' is not one of"):
        forecast([TINY], MuonConfig(), World("ddp", 2), device="tpu")
    with pytest.raises(ValueError, match="plan with lora_update='factor'"):
        forecast([TINY], MuonConfig(lora_update="product"), World("ddp", 2))
    with pytest.raises(ValueError, match="no Muon step"):
        forecast([], MuonConfig(), World("ddp", 2))


def test_buckets_wait_for_each_other_little():
    """Two matrices of a 7B model fill what the largest takes, so that none waits for it alone."""
    costs = balance("7B", 64)
    assert costs.in_lockstep <= 1.02 * max(cost.operations for cost in costs.ranks)


def test_equal_slices_prefer_no_owner():
    """Under ZeRO-3 every rank holds as much of a matrix; the first is no better than the others."""
    costs = balance("7B", 8, "zero3")
    assert costs.balance < 1.01
    assert costs.in_lockstep < 1.01 * costs.mean


def test_a_process_alone_on_a_cpu_takes_one_large_matrix_at_a_time():
    large, small = ((1024, 1024),) * 3, ((8, 64),) * 20
    parameters = [Parameter(shape, (Matrix.whole(shape),)) for shape in (*large, *small)]
    alone = buckets_of(parameters, World("ddp", 1))
    assert [len(bucket.units) for bucket in alone] == [1, 1, 1, 20]
    assert len(buckets_of(parameters, World("ddp", 2))) == 1
    assert len(buckets_of(parameters, World("fsdp2", 2))) == 1
