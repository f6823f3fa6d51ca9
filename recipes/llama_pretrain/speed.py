"""How fast a run trains: tokens per second, and the share of the hardware's peak.

In: the model, and the clock that runs with its training. Out: both numbers, in every log of the
training loss and at the end. The utilization counts the operations that the model needs, not those
that were done: recomputed activations and the optimizer do not raise it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from shared.measure import StepClock
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

# Dense bfloat16 TFLOP/s of one device, from NVIDIA's data sheets; the first matching name counts.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}


def flops_per_token(model: LlamaForCausalLM, seq_len: int) -> int:
    """Return the operations of forward and backward for one token.

    6 for every weight that is multiplied with, and 12·layers·width·seq_len for attention scores and
    their sums. The embedding is a table look-up and costs nothing (PaLM, arXiv:2204.02311,
    Appendix B).
    """
    config: LlamaConfig = model.config
    looked_up = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    multiplied = model.num_parameters() - looked_up
    return 6 * multiplied + 12 * config.num_hidden_layers * config.hidden_size * seq_len


def peak_tflops(device: torch.device) -> float | None:
    """Return the device's peak in bfloat16, or None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Rates:
    """Converts steps per second into the numbers that are reported.

    Args:
        tokens_per_step: tokens of an optimizer step, over all processes.
        flops_per_token: operations of the model for one of them.
        peak_tflops: peak of all processes together, in TFLOP/s; None if unknown.
    """

    tokens_per_step: int
    flops_per_token: int
    peak_tflops: float | None

    def at(self, steps_per_second: float) -> dict[str, float]:
        """Return tokens per second and, if the peak is known, the utilization."""
        tokens = steps_per_second * self.tokens_per_step
        shown = {"tokens_per_second": round(tokens, 1)}
        if self.peak_tflops is not None:
            achieved = tokens * self.flops_per_token / 1e12  # TFLOP/s
            shown["model_flops_utilisation"] = round(achieved / self.peak_tflops, 4)
        return shown


class LogSpeed(TrainerCallback):
    """Adds the speed since the last log to the Trainer's logs, where every reporter sees it."""

    def __init__(self, clock: StepClock, rates: Rates) -> None:
        self.clock, self.rates = clock, rates
        self._steps, self._seconds = 1, 0.0  # the clock leaves out the first step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the numbers to a log of the training loss."""
        steps, seconds = self.clock.steps - self._steps, self.clock.step_seconds - self._seconds
        if logs and "loss" in logs and steps > 0 and seconds > 0:
            logs.update(self.rates.at(steps / seconds))
            self._steps, self._seconds = self.clock.steps, self.clock.step_seconds
