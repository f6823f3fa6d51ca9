"""Checks of settings, each alone and in combination.

In: settings as attributes, each of its declared type. Out: nothing, or an error that names the
field, its value and what is allowed.
"""

from __future__ import annotations

import math
from typing import Any

from hf_muon.polar import FAMILIES, check_steps
from hf_muon.rules import FILTERS, MAPS, RESCALES, asks_the_host
from hf_muon.values import check_pattern, require_one_of, shown, with_factor


def check_settings(config: Any) -> None:
    """Raise for settings out of range, unknown names, and contradictory combinations.

    Raises:
        ValueError: Names the field, the value and what is allowed.
    """
    _check_ranges(config)
    _check_rule(config)
    _check_momentum(config)
    _check_combinations(config)


# low ≤ number < high. The upper bounds are far above anything that trains: they catch typos.
_RATES = ("lr", "adamw_lr", "weight_decay", "adamw_weight_decay", "adamw_eps")
_STEPS = (
    "momentum_warmup_steps", "momentum_cooldown_start", "momentum_cooldown_steps",
    "tangent_balance_every",
)  # fmt: skip
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("momentum", "momentum_start", "momentum_end", "adamw_betas"), (0, 1)),
    **dict.fromkeys(("map_power", "rescale_beta"), (0, 1)),
    **dict.fromkeys(_RATES, (0, 1e6)),
    **dict.fromkeys(_STEPS, (0, 1e9)),
    "momentum_weights": (-1e3, 1e3),
    "prefilter_threshold": (1e-6, 1e6),
    **dict.fromkeys(("polar_steps", "tangent_iterations"), (1, 100)),
    "lora_damping": (1e-8, 1e6),
    "bucket_mb": (1e-6, 1e6),
}


def _check_ranges(config: Any) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not low <= number < high:
                each = "each of " if isinstance(value, tuple) else ""
                raise ValueError(
                    f"{name}={shown(value)} is out of range: {low:g} ≤ {each}{name} < {high:g} is "
                    "allowed."
                )
    for name in ("muon_params", "adamw_params"):
        for pattern in getattr(config, name):
            check_pattern(name, pattern)
    _check_factors(config.lr_multipliers)


def _check_factors(items: tuple[str, ...]) -> None:
    patterns: set[str] = set()
    for item in items:
        pattern, factor = with_factor("lr_multipliers", item)
        if pattern in patterns:
            raise ValueError(f"lr_multipliers gives {shown(pattern)} twice.")
        patterns.add(pattern)
        check_pattern("lr_multipliers", pattern)
        if not 0 <= factor < _RANGES["lr"][1]:
            raise ValueError(
                f"lr_multipliers holds {shown(item)}, which is out of range: 0 ≤ factor < "
                f"{_RANGES['lr'][1]:g} is allowed."
            )


# Settings whose value is a name in a table; users may register names of their own.
_TABLES = (
    ("filter", FILTERS),
    ("matrix_map", MAPS),
    ("rescale", RESCALES),
    ("coefficients", FAMILIES),
)


def _check_rule(config: Any) -> None:
    for name, table in _TABLES:
        require_one_of(name, getattr(config, name), table)
    if config.match_update_rms and config.rescale != "none":
        raise ValueError(
            f"match_update_rms=True and rescale={config.rescale!r} both set the size of an update: "
            "choose one."
        )
    if config.match_update_rms and config.order != "post_polar":
        raise ValueError(
            f"match_update_rms=True needs order='post_polar', not {config.order!r}: only there "
            "does the size of the update differ from a polar factor's."
        )
    if config.lora_update != "factor" and config.order != "pre_polar":
        raise ValueError(
            f"lora_update={config.lora_update!r} needs order='pre_polar', not {config.order!r}: it "
            "orthogonalizes what the filter gives. Use lora_update='factor' with this order."
        )
    own = (config.matrix_map, config.rescale, config.step_rule)
    if config.lora_update != "factor" and own != ("polar", "none", "additive"):
        raise ValueError(
            f"matrix_map={own[0]!r}, rescale={own[1]!r} and step_rule={own[2]!r} with lora_update="
            f"{config.lora_update!r}, which has a map and a size of its own: leave them at "
            "'polar', 'none' and 'additive'."
        )


def _check_momentum(config: Any) -> None:
    momentum, several = config.momentum, isinstance(config.momentum, tuple)
    if several and not momentum:
        raise ValueError("momentum=() has no β: a number is expected, several of them, or 'auto'.")
    if (several or momentum == "auto") and config.filter != "ema":
        raise ValueError(
            f"momentum={shown(momentum)} with filter={config.filter!r}: several averages, and "
            "'auto', are what filter='ema' makes. Give one number, or filter='ema'."
        )
    weights = config.momentum_weights
    if weights is not None and (not several or len(weights) != len(momentum)):
        raise ValueError(
            f"momentum_weights={shown(weights)} with momentum={shown(momentum)}: one weight for "
            "each of several β is expected (optim_args: momentum=0.9:0.98,"
            "momentum_weights=0.44:0.56)."
        )
    if weights is not None and not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"momentum_weights={shown(weights)} add up to {sum(weights):g}: 1 is expected, so that "
            "a constant gradient passes as it is."
        )
    _check_schedule(config, "momentum_start", "momentum_warmup_steps")
    _check_schedule(config, "momentum_end", "momentum_cooldown_steps")
    first, last = config.momentum_cooldown_start, config.momentum_warmup_steps
    if config.momentum_cooldown_steps and first < last:
        raise ValueError(
            f"momentum_cooldown_start={first} lies within momentum_warmup_steps={last}: begin the "
            "cooldown when the warmup is over."
        )
    if first and not config.momentum_cooldown_steps:
        raise ValueError(
            f"momentum_cooldown_start={first} has no effect without momentum_cooldown_steps: set "
            "how many steps the cooldown takes, and momentum_end."
        )


def _check_schedule(config: Any, bound: str, steps: str) -> None:
    """Check β at one end of a schedule, and the number of its steps."""
    value, momentum = getattr(config, bound), config.momentum
    if (value is None) != (getattr(config, steps) == 0):
        raise ValueError(
            f"{bound}={shown(value)} and {steps}={getattr(config, steps)!r} go together: set both, "
            "or neither."
        )
    if value is None:
        return
    if config.order == "polar_only":
        raise ValueError(
            f"{bound} has no effect under order='polar_only', which has no momentum: remove it, or "
            "choose 'pre_polar' or 'post_polar'."
        )
    kinds = [len(one) if isinstance(one, tuple) else 1 for one in (value, momentum)]
    if momentum == "auto" or kinds[0] != kinds[1] or isinstance(value, tuple) != (kinds[1] > 1):
        raise ValueError(
            f"{bound}={shown(value)} with momentum={shown(momentum)}: as many numbers are expected "
            "as momentum has, and 'auto' takes no schedule."
        )


def _check_combinations(config: Any) -> None:
    if config.prefilter == "norm" and config.order != "pre_polar":
        raise ValueError(
            f"prefilter='norm' has no effect under order={config.order!r}: a polar factor has no "
            "scale. Choose 'pre_polar', or prefilter='clip'."
        )
    if config.prefilter == "norm" and config.lora_update == "tangent":
        raise ValueError(
            "prefilter='norm' with lora_update='tangent', which compares the gradients of A and B "
            "and would get each divided by another number: choose prefilter='clip', or "
            "lora_update='product'."
        )
    if config.map_power and config.matrix_map != "soft":
        raise ValueError(
            f"map_power={config.map_power!r} needs matrix_map='soft', not {config.matrix_map!r}: "
            "no other map has a power."
        )
    if config.step_rule == "hyperball":
        _check_hyperball(config)
    asking = asks_the_host(vars(config)) if config.cuda_graph else None
    if asking is not None:
        raise ValueError(
            f"cuda_graph=True with {asking}, for which the host takes part in every step, so that "
            "none can be replayed: leave one of them."
        )
    if config.lora_update != "factor" and config.cautious_weight_decay:
        raise ValueError(
            f"cautious_weight_decay=True with lora_update={config.lora_update!r}, which decays the "
            "product of two factors and not their entries: remove one of them."
        )
    if config.polar_method != "svd":
        check_steps(config.coefficients, config.polar_steps, "polar_steps")
    elif config.polar_dtype in ("bfloat16", "float16"):
        raise ValueError(
            f"polar_dtype={config.polar_dtype!r} with polar_method='svd': an SVD needs 'float32', "
            "'float64' or 'auto'."
        )
    if config.polar_kernel not in ("auto", "torch") and config.compile:
        raise ValueError(
            f"polar_kernel={config.polar_kernel!r} with compile=True, which takes torch's "
            "products: choose one."
        )


def _check_hyperball(config: Any) -> None:
    """Raise for settings that contradict ``hyperball``, which keeps the norm of a matrix."""
    for name in ("weight_decay", "skip_zero_gradients"):
        value = getattr(config, name)
        if value:
            raise ValueError(
                f"{name}={value!r} with step_rule='hyperball', which keeps the norm that each "
                f"matrix begins with: leave {name} at {type(value)()!r}. Decay of what AdamW "
                "trains is adamw_weight_decay."
            )
