"""Watch spectra while a Trainer trains.

In: the events of a Trainer whose optimizer is Muon. Out: numbers of some matrices every so many
steps, in the Trainer's logs (and so in TensorBoard, W&B, trackio) and in ``spectra.jsonl``; advice
and warnings in the log of the program. The run is the same, bit for bit, as without it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_muon.diagnostics.averages import is_kept_by_optimizer
from hf_muon.diagnostics.gradients import matching
from hf_muon.diagnostics.history import FILE_NAME, append_records
from hf_muon.diagnostics.instability import Instability
from hf_muon.diagnostics.sampling import Sampler, Values
from hf_muon.diagnostics.watched import matrix_names
from hf_muon.distributed.layout import Matrix
from hf_muon.integrations.log_values import log_with_next, take_waiting
from hf_muon.integrations.report import find_muon
from hf_muon.integrations.transformers import install_callback
from hf_muon.optimizer import Muon
from hf_muon.optimizer.pairs import moves_pairs

logger = logging.getLogger(__name__)

_DEFAULT_LAYERS = 8


class SpectralMonitor(TrainerCallback):
    r"""Logs what the spectra of gradients, momentum, weights and updates look like.

    Pass it to any Trainer: ``Trainer(..., callbacks=[SpectralMonitor(layers="mlp")])``. It works in
    one process and under DDP, FSDP2 and DeepSpeed ZeRO, where the ranks divide the matrices among
    them. A sampled step costs seven singular value decompositions of each matrix. The first step of
    a run is never sampled, as the optimizer finds its matrices in it.

    The names of the values are those of :func:`~hf_muon.diagnostics.spectra.measure` and
    :func:`~hf_muon.diagnostics.advice.advise`, and ``sin_left``, ``sin_right``: ‖sin Θ‖₂ between
    the leading subspaces of M in this sample and in the one before. In the logs they are called
    ``muon/<layer>/<name>``. Every sample asks the Trainer for a record. Callbacks that stand behind
    the monitor do not get them, so that the progress bar does not print hundreds of numbers.

    Args:
        layers: Regexes, of which one must be found in the name of a parameter. Default: eight
            matrices, spread evenly over the model.
        every: Steps from one sample to the next, ≥ 1. The drift wants samples two windows
            2/(1−β) apart, or more.
        singular_values: How many σ_k to log, ≥ 1.

    Raises:
        ValueError: A number out of its range; when training begins, a pattern that matches nothing.

    Attributes:
        warnings: What was warned of in this run: (step, layer or "", text).

    References:
        arXiv 2606.03899.

    Example:
        >>> monitor = SpectralMonitor(layers=r"layers\.0\.", every=100)
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[monitor]).train()
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        every: int = 50,
        singular_values: int = 4,
    ) -> None:
        for name, value in (("every", every), ("singular_values", singular_values)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number ≥ 1 is expected.")
        install_callback()  # which adds to the logs; Trainers that exist already may not have it
        self.layers = layers
        self.every = every
        self.singular_values = singular_values
        self.warnings: list[tuple[int, str, str]] = []
        self._optimizer: Muon | None = None
        self._sampler: Sampler | None = None
        self._instability = Instability()
        self._path = Path()
        self._begin = 0
        self._advice: dict[str, dict[str, float]] = {}
        self._logged: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the matrices, and open a part of the file."""
        self._close()
        self._optimizer = find_muon(kwargs.get("optimizer"))
        if self._optimizer is None:
            logger.warning(
                "SpectralMonitor watches Muon, and another optimizer trains: no samples."
            )
            return
        shapes = _shapes(self._optimizer, self.layers)
        self._sampler = Sampler(self._optimizer, list(shapes), self.singular_values)
        self._instability, self._begin = Instability(), state.global_step
        self.warnings, self._advice = [], {}
        self._path = Path(args.output_dir or ".", state.trial_name or "", FILE_NAME)
        if state.is_world_process_zero:
            self._say_what_is_missing(self._optimizer)
            group = self._optimizer.param_groups[0]
            about = {"every": self.every, "order": group["order"], "momentum": group["momentum"]}
            append_records(self._path, [{"begin": self._begin, **about, "layers": shapes}])

    def _say_what_is_missing(self, optimizer: Muon) -> None:
        groups = [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
        if self._begin and not all(map(is_kept_by_optimizer, groups)):
            logger.warning(
                "order=%r keeps no average of gradients, and a checkpoint none of the monitor's: "
                "SpectralMonitor samples again when its average has run in, after three windows "
                "3/(1-momentum).",
                groups[0]["order"],
            )
        if any(map(moves_pairs, groups)):
            logger.warning(
                "lora_update=%r applies no polar factor of one matrix: SpectralMonitor leaves out "
                "orthogonality_error, factor_smallest and factor_largest.",
                groups[0]["lora_update"],
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a sample. DeepSpeed makes its steps in the backward pass, so this is the time."""
        step = state.global_step + 1
        if self._sampler is not None and step > self._begin + 1 and step % self.every == 0:
            self._sampler.ask(step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Collect the sample from the ranks and hand it on."""
        if self._sampler is None or self._optimizer is None or not self._sampler.asked:
            return
        values = _on_first_rank(self._sampler.answer())
        control.should_log = True
        if not state.is_world_process_zero:
            return
        step, found = state.global_step, dict(sorted(values.items()))
        append_records(
            self._path, [{"step": step, "layer": layer, **found[layer]} for layer in found]
        )
        self._logged = {
            f"muon/{layer}/{name}": value
            for layer, of_layer in found.items()
            for name, value in of_layer.items()
        }
        log_with_next(self._optimizer, self._logged)
        for layer, of_layer in found.items():
            self._warn(step, layer, self._instability.of_sample(layer, of_layer))
            if "t_min" in of_layer:
                self._advice[layer] = of_layer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the loss, and take the sample out of the record again.

        The reporters have seen it by now; what comes next are progress bars and printers.
        """
        if logs is None or self._optimizer is None or not state.is_world_process_zero:
            return
        if missed := take_waiting(self._optimizer):
            state.log_history[-1].update(missed)
            logger.warning(
                "The samples of SpectralMonitor reach spectra.jsonl and the Trainer's history, "
                "but no reporter: make the monitor, or call hf_muon.register(), before the Trainer."
            )
        for name in self._logged:
            logs.pop(name, None)
        self._logged = {}
        if "loss" in logs:
            self._warn(state.global_step, "", self._instability.of_loss(logs["loss"]))

    def _warn(self, step: int, layer: str, texts: list[str]) -> None:
        for text in texts:
            logger.warning("Step %d%s: %s.", step, f", {layer}" if layer else "", text)
            self.warnings.append((step, layer, text))
            append_records(self._path, [{"step": step, "layer": layer, "warning": text}])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what the last samples advise."""
        for layer, values in self._advice.items():
            logger.info("%s: %s.", layer, _advice(values))
        self._close()

    def _close(self) -> None:
        if self._sampler is not None:
            self._sampler.remove()
        self._sampler = self._optimizer = None


def _shapes(optimizer: Muon, layers: str | Sequence[str] | None) -> dict[str, list[int]]:
    """(m, n) of each watched matrix, by name."""
    every = {
        name: [matrix.rows, matrix.cols]
        for group in optimizer.param_groups
        if group["algorithm"] == "muon"
        for names, inside in zip(matrix_names(group), group["matrices"], strict=True)
        for name, matrix in zip(names, (Matrix(*one) for one in inside), strict=True)
    }
    names = matching(every, layers)
    if layers is None and len(names) > _DEFAULT_LAYERS:
        last = len(names) - 1
        names = [names[round(i * last / (_DEFAULT_LAYERS - 1))] for i in range(_DEFAULT_LAYERS)]
    return {name: every[name] for name in names}


def _on_first_rank(values: Values) -> Values:
    """The values of all ranks, on rank 0; every rank must call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(values, parts)
    return {layer: found for part in parts or [] for layer, found in part.items()}


def _advice(values: dict[str, float]) -> str:
    text = (
        f"{values['visible_rank']:.0f} directions visible, from a window of {values['t_min']:.3g}"
    )
    if "suggested_momentum" in values:
        text += f" steps on; they turn by {values['drift']:.2g} radians a step, for which a "
        return text + f"momentum of {values['suggested_momentum']:.4f} is best"
    return text + " steps on"
