"""Record the optimizer's results bit by bit, and compare two records.

``record.py make OUT.json`` trains the matrices of the tests for 20 steps on given gradients, for
every rule and dtype and under every sharding that the tests know: one process, DDP, FSDP2, HSDP,
tensor parallelism, ZeRO 1 to 3, and the updates of LoRA pairs. The record holds a digest of each
weight and each state tensor on each rank, and the content of the report. ``record.py compare
BEFORE.json AFTER.json`` names the differences; exit status 1 if there are any. Make both on one
machine: kernels on other machines round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hf_muon.distributed.find import local  # noqa: E402
from hf_muon.integrations.report import build_report  # noqa: E402
from tests.distributed import layouts, pairs  # noqa: E402
from tests.distributed.launch import ON_CPU, ON_LOOPBACK  # noqa: E402

STEPS = 20
# (sharding, ranks)
LAUNCHES = (("none", 1), ("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("tp", 4), ("zero", 2))
ORDERS = ("pre_polar", "post_polar", "polar_only")
# Dtypes of weights and momentum, for plain and sharded tensors; DeepSpeed has its own.
DTYPES = {
    f"{order}, weights {weights}, momentum {momentum}": (
        getattr(torch, weights),
        {"order": order, "momentum_dtype": momentum},
    )
    for order in ORDERS
    for weights, momentum in (
        ("bfloat16", None), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", None),
    )
}  # fmt: skip
Case = tuple[torch.dtype, dict[str, Any]]
CASES: dict[str, Case] = {
    **{name: (torch.float32, settings) for name, settings in layouts.CASES.items()},
    **DTYPES,
    "quintic on X": (torch.float32, {"coefficients": "quintic", "polar_method": "newton_schulz"}),
    "four tight steps": (torch.float32, {"coefficients": "tight", "polar_steps": 4}),
    "one β of zero": (torch.float32, {"momentum": 0.0}),
}


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of the bits of a tensor, in row-major order."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]


def of_plain(kind: str, build: Callable[..., tuple[Any, Any]]) -> dict[str, Any]:
    """Train plain tensors or DTensors; return what this rank holds at the end."""
    model, optimizer = build(kind)
    for step in range(STEPS):
        for index, parameter in enumerate(model.parameters()):
            gradient = layouts.gradient(parameter.shape, step, index).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                where = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, *where, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()
    found = {f"{name}": digest(local(p)) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}: {key}"] = digest(local(value))
    return {"digests": found, "report": reported(optimizer)}


def of_zero(engine: Any, optimizer: Any, weights: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Train DeepSpeed's flat tensors; return the whole weights, and this rank's state."""
    for _ in range(STEPS):
        engine.backward(engine())
        engine.step()
    found = {name: digest(weight) for name, weight in weights().items()}
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for number, tensor in enumerate(tensors):
        for key, value in optimizer.state[tensor].items():
            found[f"flat {number}: {key}"] = digest(value)
    report = reported(optimizer)
    engine.destroy()
    return {"digests": found, "report": report}


def reported(optimizer: Any) -> dict[str, Any]:
    """Return the content of the report, without the versions."""
    report = build_report(optimizer)
    return {"optimizer": report["optimizer"], "groups": report["groups"]}


def matrices_of(kind: str, dtype: torch.dtype, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model and optimizer of a case, with weights in ``dtype``."""
    model, told = layouts.build(kind)
    model.to(dtype)
    return model, layouts.build_optimizer(model, **{**told, **settings})


def pairs_of(kind: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return the LoRA pairs and optimizer of a case."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = pairs.Model()
    if kind in ("fsdp", "hsdp"):
        world = dist.get_world_size()
        sizes = (2, world // 2) if kind == "hsdp" else (world,)
        names = ("replicate", "shard")[-len(sizes) :]
        fully_shard(model, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=names))
    told = {"replicate_group": "world"} if kind == "ddp" else {}
    return model, pairs.build_optimizer(model, **told, **settings)


def runs(kind: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield every case of a sharding, by name."""
    if kind == "zero":
        yield from zero_runs()
        return
    for name, (dtype, settings) in CASES.items():
        yield name, lambda d=dtype, s=settings: of_plain(kind, lambda k: matrices_of(k, d, s))
    for name, settings in pairs.CASES.items() if kind != "tp" else ():
        yield f"pairs: {name}", lambda s=settings: of_plain(kind, lambda k: pairs_of(k, s))


def zero_runs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield every case of DeepSpeed's stages, by name."""
    import deepspeed

    from tests.distributed import zero

    def one(stage: int, model: Any, optimizer: Any, shapes: dict[str, Any]) -> dict[str, Any]:
        zero.inject(optimizer, shapes)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=zero.config(stage)
        )
        return of_zero(engine, optimizer, lambda: zero.whole_weights(engine))

    def of_matrices(stage: int, settings: dict[str, Any]) -> dict[str, Any]:
        model = zero.Model()
        return one(stage, model, layouts.build_optimizer(model, **settings), zero.SHAPES)

    def of_pairs(stage: int, settings: dict[str, Any]) -> dict[str, Any]:
        model = pairs.Model()
        return one(stage, model, pairs.build_optimizer(model, **settings), pairs.SHAPES)

    for stage in zero.STAGES:
        for name, settings in layouts.CASES.items():
            yield f"stage {stage}, {name}", lambda z=stage, s=settings: of_matrices(z, s)
    for stage in pairs.STAGES:
        for name, settings in pairs.CASES.items():
            yield f"stage {stage}, pairs: {name}", lambda z=stage, s=settings: of_pairs(z, s)


def work(kind: str, out: str) -> None:
    """Run all cases of a sharding on one rank of a launch."""
    if kind == "zero":
        import deepspeed

        deepspeed.init_distributed("gloo")
    with layouts.process_group():
        results: dict[str, Any] = {}
        for name, run in runs(kind):
            found = run()
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found["digests"])
            results[name] = {"ranks": everyone, "report": found["report"]}
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(results), encoding="utf-8")


def make(out: Path, only: list[str]) -> None:
    """Launch every sharding and merge the results."""
    record = {}
    for kind, ranks in LAUNCHES:
        if only and kind not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "record.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
            command += [str(ranks), *ON_LOOPBACK, __file__, "work", kind, str(path)]
            subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **ON_CPU})
            record[f"{kind}, {ranks} ranks"] = json.loads(path.read_text(encoding="utf-8"))
        print(f"{kind}: {len(record[f'{kind}, {ranks} ranks'])} cases", flush=True)
    out.write_text(json.dumps(record), encoding="utf-8")


def compare(before: Path, after: Path) -> int:
    """Print the cases whose bits or reports differ; return the number with different bits."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    differing, reports = 0, Counter[str]()
    for launch in old:
        for case, expected in old[launch].items():
            found = new.get(launch, {}).get(case, {"ranks": [{}] * 8, "report": expected["report"]})
            names = sorted(
                f"rank {rank} {name}"
                for rank, (one, other) in enumerate(zip(expected["ranks"], found["ranks"]))  # noqa: B905
                for name in one
                if one[name] != other.get(name)
            )
            reports.update(differing_reports(expected["report"], found["report"]))
            if names:
                differing += 1
                print(f"{launch}: {case}: {len(names)} tensors ({', '.join(names[:4])})")
    print(f"{differing} of {sum(map(len, old.values()))} cases have other bits.")
    print("Other in reports:", ", ".join(f"{key} ({n})" for key, n in reports.items()) or "nothing")
    return differing


def differing_reports(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the keys of a report that differ, without keys that only the new one has."""
    found = [] if old["optimizer"] == new["optimizer"] else ["optimizer"]
    for number, (one, other) in enumerate(zip(old["groups"], new["groups"], strict=True)):
        found += [f"group {number} {key}" for key in one if one[key] != other.get(key)]
    return found


def main() -> None:
    """Parse the command line, and make or compare records."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("out", type=Path)
    making.add_argument("--only", nargs="*", default=[], help="shardings; default: all")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    working = commands.add_parser("work")
    working.add_argument("kind")
    working.add_argument("out")
    given = parser.parse_args()
    if given.command == "make":
        make(given.out, given.only)
    elif given.command == "compare":
        raise SystemExit(compare(given.before, given.after) > 0)
    else:
        work(given.kind, given.out)


if __name__ == "__main__":
    main()
