"""Print how the polar factors of LLaMA models spread over many ranks, as a Markdown table.

In: names of models, numbers of ranks, a layout, two rates. Out: a row for each model and number of
ranks, from the plan that a run would make, without a process group or weights. With
``--tokens-per-rank``, rows give the share of a training step; with ``--device``, the work and the
memory of a device in a step.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from hf_muon.commands.hardware import DEVICES, Links, device_of, links_of
from hf_muon.commands.imaginary import Parameter, World
from hf_muon.commands.plan import Forecast, forecast, short
from hf_muon.commands.roofline import roofline
from hf_muon.config import MuonConfig
from hf_muon.distributed.layout import Matrix


class Llama(NamedTuple):
    """The shape of a LLaMA: width, MLP width, number of layers, width of keys and values."""

    hidden: int
    inner: int
    layers: int
    keys: int

    def parameters(self) -> list[Parameter]:
        """Return the hidden matrices, in the model's order."""
        hidden, inner, layers, keys = self
        attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
        mlp = [(inner, hidden), (inner, hidden), (hidden, inner)]
        return [Parameter(s, (Matrix.whole(s),)) for s in [*attention, *mlp] * layers]


MODELS = {
    # GaLore (arXiv 2403.03507), table 5
    "60M": Llama(512, 1376, 8, 512),
    "130M": Llama(768, 2048, 12, 768),
    "350M": Llama(1024, 2736, 24, 1024),
    "1B": Llama(2048, 5461, 24, 2048),
    # LLaMA (arXiv 2302.13971) and Llama 3 (arXiv 2407.21783)
    "7B": Llama(4096, 11008, 32, 4096),
    "70B": Llama(8192, 28672, 80, 1024),
}
COLUMNS = (
    "model", "matrices", "ranks", "TFLOP per step", "max/mean", "lower bound", "idle ranks",
    "busiest rank ms", "in lockstep ms", "duplicated ms", "MB sent per rank", "MB extra per rank",
)  # fmt: skip


OVERHEAD_COLUMNS = (
    "model", "ranks", "training step ms", "polar factors ms", "messages ms", "overhead, overlapped",
    "in turn", "each rank all", "bound by",
)  # fmt: skip


def row(name: str, costs: Forecast, tflops: float, links: Links) -> list[str]:
    """Return the cells of one line; numbers are the largest over the ranks."""
    facts = costs.to_dict(tflops, links)
    sent = max(one["bytes_sent"] for one in facts["per_rank"]) / 1e6
    extra = max(one["peak_extra_bytes"] for one in facts["per_rank"]) / 1e6
    return [
        name,
        str(facts["matrices"]),
        str(facts["ranks"]),
        short(facts["newton_schulz_flops"] / 1e12),
        f"{facts['max_over_mean']:.2f}",
        f"{facts['lower_bound']:.2f}",
        str(facts["idle_ranks"]),
        *(short(facts[key]) for key in ("polar_ms", "polar_in_lockstep_ms", "polar_duplicated_ms")),
        short(sent),
        short(extra),
    ]


def overhead_row(name: str, costs: Forecast, given: argparse.Namespace) -> list[str]:
    """Return the cells of one line of the table of overheads.

    A training step takes 6 operations per hidden weight and token, at the rate of the polar
    factors. Embeddings, attention scores and the AdamW half are left out, which overstates the
    share. If polar factors and messages overlap, the longer of the two counts; otherwise their sum.
    """
    facts = costs.to_dict(given.tflops, Links(given.gbps, given.gbps))
    weights = sum(rows * cols for one in MODELS[name].parameters() for rows, cols in [one.shape])
    step = 6 * weights * given.tokens_per_rank / (given.tflops * 1e9)  # ms
    polar, wire = facts["polar_in_lockstep_ms"], facts["wire_ms"]
    one_matrix = facts["lower_bound"] > 1.01  # more ranks than the largest matrix can keep busy
    bound = "messages" if wire > polar else "one matrix" if one_matrix else "polar factors"
    shares = (max(polar, wire) / step, (polar + wire) / step, facts["polar_duplicated_ms"] / step)
    times = (short(value) for value in (step, polar, wire))
    return [name, str(facts["ranks"]), *times, *(f"{share:.2%}" for share in shares), bound]


DEVICE_COLUMNS = (
    "model", "ranks", "launches", "host waits", "TFLOP", "GB touched", "products ms", "the rest ms",
    "host ms", "messages ms", "held GB", "temporaries MB",
)  # fmt: skip


def device_row(name: str, config: MuonConfig, world: World, device: str) -> list[str]:
    """Return the cells of one line of the table of devices, for float32 weights.

    Numbers are the largest over the ranks. Temporaries are counted for one rank, and estimated for
    several.
    """
    model, chosen = [MODELS[name].parameters()], device_of(device)
    costs = forecast(model, config, world, device=device)
    facts = costs.to_dict(chosen.operations_per_second(in_half=True) / 1e12, links_of(chosen))
    asked = roofline(model, config, world, chosen, dtype=torch.float32, wire=costs.wire).to_dict()
    estimated = max(one["peak_extra_bytes"] for one in facts["per_rank"])
    extra = asked["peak_temporary_bytes"] or estimated
    times = (asked["products_ms"], asked["elementwise_ms"], asked["host_ms"], facts["wire_ms"])
    return [
        name,
        str(world.ranks),
        f"{asked['launches']:,}",
        str(asked["host_waits"]),
        *(short(value) for value in (asked["flops"] / 1e12, asked["bytes_touched"] / 1e9, *times)),
        f"{asked['held_bytes'] / 1e9:,.2f}",
        f"{extra / 1e6:,.0f}",
    ]


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512, 1024])
    parser.add_argument("--layout", default="fsdp2")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--optim-args")
    parser.add_argument("--tflops", type=float, default=400.0)
    parser.add_argument("--gbps", type=float, default=50.0)
    parser.add_argument(
        "--tokens-per-rank", type=int, help="print the overhead on a step of so many tokens instead"
    )
    parser.add_argument(
        "--device", choices=[one for one in DEVICES if one != "cpu"],
        help="print what a step asks of it instead",
    )  # fmt: skip
    given = parser.parse_args()
    config = MuonConfig.from_optim_args(given.optim_args)
    columns = OVERHEAD_COLUMNS if given.tokens_per_rank else COLUMNS
    columns = DEVICE_COLUMNS if given.device else columns
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in given.models:
        for ranks in given.ranks:
            world = World(given.layout, ranks, given.replicas)
            if given.device:
                print(
                    f"| {' | '.join(device_row(name, config, world, given.device))} |", flush=True
                )
                continue
            costs = forecast([MODELS[name].parameters()], config, world)
            cells = (
                overhead_row(name, costs, given)
                if given.tokens_per_rank
                else row(name, costs, given.tflops, Links(given.gbps, given.gbps))
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
