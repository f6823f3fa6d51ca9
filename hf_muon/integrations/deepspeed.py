"""DeepSpeed configurations that would replace Muon, or make it train something else.

In: DeepSpeed's configuration as a dict. Out: nothing, or an error that names each setting and what
to do. Most of these settings raise nowhere else: DeepSpeed and accelerate silently use another
optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from hf_muon.config import MuonConfig

Config = Mapping[str, Any]


def check_deepspeed(run: MuonConfig | None = None) -> None:
    """Check the configuration of this process, if it trains with DeepSpeed."""
    if "transformers.integrations.deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import deepspeed_config

        config = deepspeed_config()  # type: ignore[no-untyped-call]
        if config is not None:
            check_config(config, run)


def check_config(config: Config, run: MuonConfig | None = None) -> None:
    """Raise for settings that Muon cannot train under.

    Args:
        config: A DeepSpeed configuration (0.19), or a part of one.
        run: The settings of the run. Default: skip the checks that depend on them.

    Raises:
        ValueError: Names every setting that has to change.
    """
    problems = [f"{setting}: {remedy}" for setting, is_set, remedy in _REFUSED if is_set(config)]
    schedule = _at(config, "scheduler.type")
    for name, value in _rates_of_their_own(run).items() if schedule in _ABSOLUTE else ():
        problems.append(
            f"scheduler: {schedule} gives all parameters the same rates, and {name}={value!r} "
            "would be lost. Remove the section and set lr_scheduler_type, which scales all rates, "
            f"or leave {name} out."
        )
    if problems:
        raise ValueError("The DeepSpeed config does not let Muon train.\n" + "\n".join(problems))


def _rates_of_their_own(run: MuonConfig | None) -> dict[str, object]:
    """Return the settings that give some parameters a learning rate of their own."""
    if run is None:
        return {}
    own: dict[str, object] = {"adamw_lr": run.adamw_lr, "lr_multipliers": run.lr_multipliers}
    return {name: value for name, value in own.items() if value not in (None, (), run.lr)}


# Schedules that overwrite learning rates; WarmupCosineLR scales each group's (DeepSpeed 0.19).
_ABSOLUTE = ("WarmupLR", "WarmupDecayLR", "OneCycle", "LRRangeTest")


def _at(config: Config, path: str) -> Any:
    """Return the value at a path of keys, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _number_at(config: Config, path: str, default: float) -> float:
    value = _at(config, path)
    return value if isinstance(value, int | float) else default


def _offload(config: Config) -> Config:
    """Return the section of optimizer offload; empty if it is not enabled."""
    section = _at(config, "zero_optimization.offload_optimizer")
    return section if _at(section, "device") not in (None, "none") else {}


def _forced(config: Config) -> bool:
    return bool(_offload(config)) and config.get("zero_force_ds_cpu_optimizer", True) is not False


def _is_nvme(config: Config) -> bool:
    sections = ("offload_optimizer", "offload_param")
    return any(_at(config, f"zero_optimization.{s}.device") == "nvme" for s in sections)


# (setting, whether a configuration enables it, what to do about it)
_REFUSED: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    (
        "optimizer",
        lambda config: bool(config.get("optimizer")),
        "DeepSpeed uses this optimizer and ignores the Trainer's. Remove the section.",
    ),
    (
        "zero_force_ds_cpu_optimizer",
        _forced,
        "with offload_optimizer, its default lets accelerate put DeepSpeedCPUAdam in Muon's "
        "place. Set it to false, at the top level of the config.",
    ),
    (
        "zero_optimization.offload_optimizer.device = nvme",
        _is_nvme,
        "what is on NVMe is not in memory when Muon steps. Use the device 'cpu'.",
    ),
    (
        "zero_optimization.offload_optimizer.ratio",
        lambda config: _number_at(_offload(config), "ratio", 1) < 1,
        "a part below 1 is stepped by DeepSpeedCPUAdam. Remove it.",
    ),
    (
        "zero_optimization.offload_optimizer.super_offload",
        lambda config: bool(_offload(config).get("super_offload")),
        "the step is DeepSpeed's own Adam. Remove it.",
    ),
    (
        "zero_optimization.round_robin_gradients",
        lambda config: bool(_at(config, "zero_optimization.round_robin_gradients")),
        "it makes DeepSpeed's map of its flat tensors wrong. Remove it.",
    ),
    (
        "zero_optimization.zenflow",
        lambda config: bool(_at(config, "zero_optimization.zenflow")),
        "it steps parts of a matrix at different times. Remove the section.",
    ),
    (
        "zero_optimization.zero_hpz_partition_size",
        lambda config: _number_at(config, "zero_optimization.zero_hpz_partition_size", 1) > 1,
        "Muon has not been tried with hierarchical partitions. Remove it.",
    ),
    (
        "zero_optimization.mics_shard_size",
        lambda config: _number_at(config, "zero_optimization.mics_shard_size", 0) > 0,
        "Muon has not been tried with MiCS. Remove it.",
    ),
    (
        "tensor_parallel.autotp_size",
        lambda config: _number_at(config, "tensor_parallel.autotp_size", 1) > 1,
        "DeepSpeed cuts matrices in ways that Muon does not know. Use FSDP2 with tensor "
        "parallelism.",
    ),
)
