"""Time a step of each filter, map, rescaling and step rule against plain Muon, in one run.

In: a LLaMA shape, number of layers, repeats. Out: a Markdown table of medians with range: the time
of each relative to the defaults in the same round, and state bytes per matrix parameter. Only the
matrices are trained. Contenders take turns in one process on the same gradients.

    python scripts/bench/family.py --model 60m --layers 2 --repeats 15
"""

from __future__ import annotations

import argparse

import torch
from step import ours
from turns import LLAMA, Parameters, state_bytes_per_parameter, summary, take_turns

FAMILY: dict[str, dict[str, object]] = {
    "defaults": {},
    "two terms": {"momentum": (0.9, 0.98), "momentum_weights": (0.44, 0.56)},
    "four terms": {"momentum": (0.8, 0.9, 0.95, 0.98)},
    "momentum=auto": {"momentum": "auto"},
    "prefilter=clip": {"prefilter": "clip"},
    "prefilter=norm": {"prefilter": "norm"},
    "matrix_map=polargrad": {"matrix_map": "polargrad"},
    "matrix_map=soft": {"matrix_map": "soft", "map_power": 0.25},
    "rescale=rows": {"rescale": "rows"},
    "rescale=entries": {"rescale": "entries"},
    "rescale=frobenius": {"rescale": "frobenius"},
    "step_rule=relative": {"step_rule": "relative"},
    "step_rule=hyperball": {"step_rule": "hyperball", "weight_decay": 0.0},
    "momentum_dtype=int8": {"momentum_dtype": "int8"},
    "momentum_dtype=bfloat16": {"momentum_dtype": "bfloat16"},
}


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=LLAMA, default="60m")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=FAMILY, default=list(FAMILY))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    steps, optimizers = {}, {}
    for name in dict.fromkeys(["defaults", *arguments.only]):
        torch.manual_seed(0)
        parameters = Parameters(LLAMA[arguments.model], arguments.layers, arguments.device)
        parameters.others = []
        steps[name], optimizers[name] = ours(parameters, **FAMILY[name])
    rounds = take_turns(steps, arguments.repeats, arguments.device)
    print("| setting | time over that of the defaults | range | state bytes per parameter |")
    print("|---|---|---|---|")
    for name, optimizer in optimizers.items():
        ratio, spread = summary([one[name] / one["defaults"] for one in rounds], ".2f")
        state = state_bytes_per_parameter(optimizer)
        print(f"| `{name}` | {ratio} | {spread} | {state:.2f} |")


if __name__ == "__main__":
    main()
