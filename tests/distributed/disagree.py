"""Ranks that do not train the same, and maps that fail on one of them: disagree.py KIND OUT.

KIND is ddp, fsdp or zero (stages 1 and 3). Rank 0 writes for each case what every rank's step
raised, after how many seconds, and whether weights and state are as before.
"""

import sys
import time
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_muon import create_muon_optimizer
from hf_muon.distributed.find import local
from hf_muon.polar import factor, precision
from tests.distributed import layouts

# What the second rank has otherwise.
SETTINGS = {
    "order": {"order": "post_polar"},
    "lr": {"lr": 0.03},
    "weight_decay": {"weight_decay": 0.2},
    "bucket_mb": {"bucket_mb": 0.01},
    "distribute": {"distribute": "redundant"},
    "polar_dtype": {"polar_dtype": "bfloat16"},
}


def other_matrices():
    """The second rank takes a fused projection for one matrix."""
    return mock.patch.dict(layouts.MATRICES, {"fused": layouts.whole(torch.Size((50, 32)))})


def fewer_parameters():
    """The second rank has left one out."""
    return mock.patch.dict(layouts.VECTORS, {"tiny": (5, 40)})


def more_vectors():
    """The second rank's AdamW has one more."""
    return mock.patch.dict(layouts.VECTORS, {"more": (7,)})


def other_hardware():
    """The second rank has instructions for bfloat16, the first one has none."""
    precision.has_native_bfloat16.cache_clear()
    native = bool(dist.get_rank())
    return mock.patch.object(precision, "_cpu_has_native_bfloat16", return_value=native)


def svd_fails():
    """The second rank's decomposition does not converge."""
    if dist.get_rank() == 0:
        return mock.patch.object(factor, "svd_polar", factor.svd_polar)
    error = torch.linalg.LinAlgError("did not converge")
    return mock.patch.object(factor, "svd_polar", mock.Mock(side_effect=error))


def outcome(step, tensors):
    """What a step raises on each rank, after how long, and whether it changed anything."""
    before = [tensor.clone() for tensor in tensors()]
    started, said = time.monotonic(), None
    try:
        step()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    same = all(map(torch.equal, before, tensors()))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (said, time.monotonic() - started, same))
    return everyone


class Plain:
    """DDP or FSDP2."""

    def __init__(self, kind, **settings):
        self.model, more = layouts.build(kind)
        self.optimizer = layouts.build_optimizer(self.model, **more, **settings)
        self.steps = 0

    def step(self):
        layouts.set_gradients(self.model, self.steps)
        self.steps += 1
        self.optimizer.step()

    def tensors(self):
        state = [v for of in self.optimizer.state.values() for v in of.values()]
        return [local(tensor) for tensor in [*self.model.parameters(), *state]]


class Zero:
    """DeepSpeed."""

    def __init__(self, kind, **settings):
        from tests.distributed import zero

        self.engine, self.optimizer = zero.build(int(kind[-1]), **settings)
        # After an error the groups stay as DeepSpeed had made them for the call.
        self.flats = [t for group in self.optimizer.param_groups for t in group["params"]]

    def step(self):
        self.engine.backward(self.engine())
        self.engine.step()

    def tensors(self):
        state = [v for of in self.optimizer.state.values() for v in of.values()]
        return [*self.flats, *state]


def cases(kind):
    make = Zero if kind.startswith("zero") else Plain
    mine = dist.get_rank() == 1

    for name, settings in SETTINGS.items():
        yield name, outcome_of_first(make, kind, settings if mine else {})
    contexts = {"matrices": other_matrices, "parameters": fewer_parameters, "more": more_vectors}
    for name, context in contexts.items() if make is Plain else ():
        with context() if mine else mock.patch.dict(layouts.VECTORS):
            yield name, outcome_of_first(make, kind, {})
    with other_hardware():
        yield "hardware", outcome_of_first(make, kind, {"polar_dtype": "auto"})
    precision.has_native_bfloat16.cache_clear()

    if make is Plain:
        yield "steps", resumed(kind)
        yield "one rank compares", changed(kind, reload)
        yield "one rank has more" if kind == "ddp" else "copies or not", changed(kind, grow)
        yield "broken state", breaks(kind)
    if kind == "fsdp":
        yield "copies beside shards", beside_shards(averaged=False)
        yield "equal copies beside shards", beside_shards(averaged=True)

    run = make(kind)
    run.step()
    if mine:
        run.optimizer.param_groups[0]["lr"] *= 0.5
    yield "lr, later", outcome(run.step, run.tensors)

    run = make(kind, polar_method="svd", distribute="owner")
    run.step()
    with svd_fails():
        yield "svd", outcome(run.step, run.tensors)
    if make is Plain:  # DeepSpeed's engine is not made to go on after an error
        run.step()
        yield "svd, after it", [bool(torch.isfinite(run.tensors()[0]).all())]


def resumed(kind):
    """The second rank alone has loaded the state of a first step."""
    first, run = Plain(kind), Plain(kind)
    first.step()
    if dist.get_rank() == 1:
        run.optimizer.load_state_dict(first.optimizer.state_dict())
    return outcome(run.step, run.tensors)


def changed(kind, change):
    """The second rank alone changes its optimizer between two steps."""
    run = Plain(kind)
    run.step()
    if dist.get_rank() == 1:
        change(run.optimizer)
    return outcome(run.step, run.tensors)


def reload(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def grow(optimizer):
    more = torch.nn.Parameter(torch.ones(4, 4))
    optimizer.add_param_group({"params": [("more", more)]})


def breaks(kind):
    """The second rank's state cannot be used."""
    first, run = Plain(kind), Plain(kind)
    first.step()
    run.optimizer.load_state_dict(first.optimizer.state_dict())
    if dist.get_rank() == 1:
        next(iter(run.optimizer.state.values()))["step"] = torch.ones(2)
    return outcome(run.step, run.tensors)


def beside_shards(*, averaged):
    """FSDP2 leaves one parameter to the user, who has averaged its gradient or not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params={model[0].weight})
    optimizer = create_muon_optimizer(model, lr=0.1, replicate_group="world")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[0].weight.grad *= 1 if averaged else 1 + dist.get_rank()
    return outcome(optimizer.step, lambda: list(map(local, model.parameters())))


def outcome_of_first(make, kind, settings):
    run = make(kind, **settings)
    return outcome(run.step, run.tensors)


def main(kind, out):
    kinds = ["zero1", "zero3"] if kind == "zero" else [kind]
    results = {(one, name): found for one in kinds for name, found in cases(one)}
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    if sys.argv[1] == "zero":
        import deepspeed

        deepspeed.init_distributed("gloo")
    with layouts.process_group():
        main(*sys.argv[1:])
