"""Watch spectra while a Trainer trains.

In: the events of a Trainer whose optimizer is Muon. Out: numbers for some matrices at sampled
steps, in the Trainer's logs (and so in TensorBoard, W&B, trackio) and in ``spectra.jsonl``; advice
and warnings in the program's log. Training is the same, bit for bit, as without it.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_muon.diagnostics.activations import Activations
from hf_muon.diagnostics.advice import in_words
from hf_muon.diagnostics.history import FILE_NAME, append_records
from hf_muon.diagnostics.instability import Instability
from hf_muon.diagnostics.sampling import Sampler, left_out
from hf_muon.diagnostics.watched import chosen_matrices
from hf_muon.integrations.log_values import log_with_next, take_waiting
from hf_muon.integrations.report import find_muon
from hf_muon.integrations.transformers import install_callback
from hf_muon.optimizer import Muon

logger = logging.getLogger(__name__)

_DEFAULT_LAYERS = 8


class SpectralMonitor(TrainerCallback):
    r"""Logs the spectra of gradients, momentum, weights and updates.

    Pass it to any Trainer: ``Trainer(..., callbacks=[SpectralMonitor(layers="mlp")])``. It works in
    one process and under DDP, FSDP2 and DeepSpeed ZeRO, where the ranks divide the matrices among
    themselves. A sampled step costs seven singular value decompositions of each matrix, and one of
    its layer's inputs. The first step of a run is never sampled, because the optimizer finds its
    matrices in that step.

    The names of the values are those of :func:`~hf_muon.diagnostics.spectra.measure` and
    :func:`~hf_muon.diagnostics.advice.advise`; ``sin_left`` and ``sin_right``: ‖sin Θ‖₂ between the
    leading subspaces of M in this sample and the previous one; and ``input_stable_rank``:
    ‖A‖_F²/‖A‖₂² of the input of a matrix's ``nn.Linear``, where A has one row for each of at most
    4096 tokens per rank. In the logs they are called ``muon/<layer>/<name>``. Every sample makes
    the Trainer log a record. Callbacks after the monitor do not see the values, so that the
    progress bar does not print hundreds of numbers.

    Args:
        layers: Regexes, one of which must match in a parameter's name. Default: eight matrices,
            spread evenly over the model.
        every: Steps between samples, ≥ 1. To measure the drift, samples should be at least two
            windows 2/(1−β) apart.
        singular_values: How many σ_k to log, ≥ 1.

    Raises:
        ValueError: A number is out of range; or, when training begins, a pattern matches nothing.

    Attributes:
        warnings: The warnings of this run: (step, layer or "", text).

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
        install_callback()  # it adds values to the logs; existing Trainers may lack it
        self.layers = layers
        self.every = every
        self.singular_values = singular_values
        self.warnings: list[tuple[int, str, str]] = []
        self._optimizer: Muon | None = None
        self._sampler: Sampler | None = None
        self._activations: Activations | None = None
        self._instability = Instability()
        self._path = Path()
        self._begin = 0
        self._latest: dict[str, deque[dict[str, float]]] = defaultdict(partial(deque, maxlen=5))
        self._logged: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the matrices, and begin a part of the file."""
        self._close()
        self._optimizer = find_muon(kwargs.get("optimizer"))
        if self._optimizer is None:
            logger.warning(
                "SpectralMonitor watches Muon, and another optimizer trains: no samples."
            )
            return
        shapes = chosen_matrices(self._optimizer, self.layers, _DEFAULT_LAYERS)
        self._sampler = Sampler(self._optimizer, list(shapes), self.singular_values)
        self._activations = Activations(kwargs["model"], shapes)
        self._instability, self._begin = Instability(), state.global_step
        self.warnings.clear()
        self._latest.clear()
        self._path = Path(args.output_dir or ".", state.trial_name or "", FILE_NAME)
        if state.is_world_process_zero:
            groups = self._optimizer.param_groups
            for text in left_out(groups, resumed=self._begin > 0):
                logger.warning("SpectralMonitor %s", text)
            settings = {key: groups[0][key] for key in ("order", "momentum", "nesterov")}
            begin = {"begin": self._begin, "every": self.every, **settings, "layers": shapes}
            append_records(self._path, [begin])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a sample here, because DeepSpeed steps inside the backward pass."""
        step = state.global_step + 1
        if self._sampler is not None and step > self._begin + 1 and step % self.every == 0:
            self._sampler.ask(step)
            if self._activations is not None:
                self._activations.ask()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Collect the sample from the ranks, and write and log it."""
        if self._sampler is None or self._optimizer is None or not self._sampler.asked:
            return
        found = self._sampler.answer()
        inputs = self._activations.answer() if self._activations is not None else {}
        control.should_log = True
        if not state.is_world_process_zero:
            return
        step = state.global_step
        for layer, values in found.items():
            if layer in inputs:
                values["input_stable_rank"] = inputs[layer]
            self._warn(step, layer, self._instability.of_sample(layer, values))
            found[layer] = {name: v for name, v in values.items() if math.isfinite(v)}
            self._latest[layer].append(found[layer])
        self._warn(step, "", self._instability.of_all(found.values()))
        append_records(self._path, [{"step": step, "layer": at, **found[at]} for at in found])
        self._logged = {f"muon/{at}/{name}": v for at in found for name, v in found[at].items()}
        log_with_next(self._optimizer, self._logged)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the loss, and remove the sample from the record.

        The reporters have received it by now; only progress bars and printers come later.
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
        """Log the advice of the last samples."""
        for layer, samples in self._latest.items():
            logger.info("%s: %s.", layer, in_words(samples))
        self._close()

    def _close(self) -> None:
        if self._sampler is not None:
            self._sampler.remove()
        if self._activations is not None:
            self._activations.remove()
        self._sampler = self._optimizer = self._activations = None
