"""All settings of the optimizer, in one place.

In: keyword arguments, a Trainer ``optim_args`` string, or a JSON file. Out: a frozen, checked
:class:`MuonConfig`, and the plain hyper-parameters of a param group. Values are scalars or tuples
of scalars, so that they survive command lines, JSON and checkpoints.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from hf_muon.checks import check_settings
from hf_muon.rules import rule_of
from hf_muon.stages import Momentum, Rule
from hf_muon.values import parsed, read_json, require_known, shown, typed, with_factor

Order = Literal["pre_polar", "post_polar", "polar_only"]
LoraUpdate = Literal["factor", "product", "tangent"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Settings of Muon, which trains the hidden matrices, and of AdamW, which trains the rest.

    β is the coefficient of the momentum filter M ← βM + (1−β)G; its window is T = 1/(1−β) steps. An
    m × n matrix has m = fan_out and n = fan_in. Unset learning rates come from the Trainer's
    arguments when the optimizer is chosen by name.

    Attributes:
        order: ``pre_polar`` orthogonalizes the filtered gradient (Muon), ``post_polar`` filters
            the orthogonalized gradient (Orthogonal-SGDM), ``polar_only`` uses no filter.
        momentum: β in [0, 1). Several values: one average each, added with ``momentum_weights``.
            ``auto``: of averages over 5, 10, 20, 50 and 100 steps, each matrix uses the one that
            predicts its next gradient best.
        momentum_weights: Weights of the averages, with sum 1. None: equal weights.
        nesterov: Use (1−β)G + βM instead of M; with several averages β is their weighted mean.
            ``polar_only`` has no filter and ignores it, as it ignores ``momentum``.
        prefilter: What to do to gradients first: ``none``; ``clip`` bounds entries by
            ±``prefilter_threshold`` times the running median of abs(G) of their matrix; ``norm``
            divides each matrix by its Frobenius norm.
        prefilter_threshold: That multiple, > 0.
        filter: The momentum filter, before or after the polar factor: ``ema``, or a name registered
            with :func:`hf_muon.rules.register_filter`.
        matrix_map: The function of a whole matrix: ``polar``, its polar factor; ``polargrad``, the
            polar factor times the nuclear norm; ``soft``, U(Σ/σ₁)ᵖVᵀ by SVD; or a name registered
            with :func:`hf_muon.rules.register_map`.
        map_power: p of ``soft``, in [0, 1).
        rescale: How to rescale an update U: ``none``, ``frobenius`` (U·√min(m, n)/‖U‖_F), ``rows``
            (NorMuon), ``entries`` (AdaMuon), or a name registered with
            :func:`hf_muon.rules.register_rescale`.
        rescale_beta: β₂ of the averages of squares in ``rows`` and ``entries``.
        match_update_rms: ``post_polar`` only: rescale each update to the RMS of a polar factor,
            1/√max(m, n).
        polar_method: ``newton_schulz``, ``gram``, ``svd``, or ``auto``, the cheapest for the shape.
        coefficients: ``polar_express`` (one triple per step, minimax), ``tight`` (the same with a
            tighter scaling: less error on momentum), ``quintic`` (Jordan's),
            or a name from ``hf_muon.polar.register_coefficients``.
        polar_steps: Iterations; 3 to 8 for ``polar_express`` and ``tight``.
        polar_dtype: ``auto`` is bfloat16 where the device computes it natively, else float16 on
            GPUs with tensor cores for it (V100, T4), else float32. On a CPU, ``gram`` also uses
            float32 where one side of a matrix is at most 16.
        polar_kernel: What computes the matrix products: ``torch``, ``triton``, ``quack``
            (quack-kernels), or ``auto``: ``triton`` in half precision on NVIDIA devices if it is
            installed and passes a check at first use, else ``torch``.
        adjust_lr: Step-size factor: ``match_rms_adamw`` 0.2·√max(m, n), ``original`` √max(1, m/n),
            ``spectral`` √(m/n), ``none`` 1.
        lr: Learning rate of the Muon half.
        adamw_lr: Learning rate of the AdamW half; None takes ``lr``, which only
            ``match_rms_adamw`` allows.
        lr_multipliers: ``PATTERN:FACTOR`` items, or a mapping: a regex for parameter names, and the
            number that multiplies their learning rate, in either half. The first match counts.
        weight_decay: Decoupled weight decay λ of the Muon half: W ← (1 − lr·λ)W.
        adamw_weight_decay: The same for the AdamW half; None takes ``weight_decay``.
        cautious_weight_decay: Decay an entry of a matrix only where the update has the same sign.
        adamw_betas: β₁ and β₂ of the AdamW half.
        adamw_eps: ε of the AdamW half.
        step_rule: ``additive``, W ← (1 − lr·λ)W − lr·s·U with the step-size factor s; ``relative``,
            with ‖W‖_F/‖U‖_F in place of s; ``hyperball``, which keeps the norm that W began with.
        momentum_start: β at the first step of the warmup; one value, or one per average.
        momentum_warmup_steps: Steps over which β goes from ``momentum_start`` to ``momentum``.
        momentum_end: β at the end of the cooldown.
        momentum_cooldown_start: The step at which the cooldown begins.
        momentum_cooldown_steps: Steps over which β goes from ``momentum`` to ``momentum_end``.
        momentum_schedule: ``linear``, or ``cosine`` (half a period).
        momentum_dtype: Dtype of the momentum buffers; None is the parameter's. ``int8`` takes one
            byte per entry, and a float32 per block of up to 2048 entries of a row.
        muon_params: Regexes of parameter names that go to Muon whatever the rules say.
        adamw_params: Regexes of parameter names that go to AdamW whatever the rules say.
        conv: What trains convolution kernels: ``adamw``; or ``flatten``: Muon, as matrices
            (out, in · window), one per group. Depthwise kernels are vectors and stay with AdamW.
        split_fused: Treat fused projections (query, key, value in one weight) as several matrices.
        split_heads: Treat query, key and value projections, fused or not, as one matrix per
            attention head, where the architecture declares heads. Adapters stay whole.
        lora_update: ``factor``: the A and B of a LoRA adapter are two separate matrices.
            ``product`` (LoRA-Muon) and ``tangent`` (LoRA-TSD) update them together, as the product
            BA; only with ``pre_polar``.
        lora_damping: δ of ``product`` and ``tangent``: they invert S + δ·(tr S/r)·I, where S is
            AAᵀ or BᵀB.
        tangent_iterations: τ of ``tangent``: how often a step is orthogonalized and projected.
        tangent_balance_every: Number of steps after which ``tangent`` makes ‖A‖ and ‖B‖ about
            equal; 0: never.
        skip_zero_gradients: In a step in which the gradient of a matrix is exactly zero on all
            ranks, leave the matrix and its state unchanged. Otherwise momentum keeps moving it at
            full speed, since a polar factor has no scale: think of an expert that gets no tokens.
        distribute: ``owner``: ranks that hold copies of a matrix divide the polar factors among
            themselves; ``redundant``: each computes all; ``auto``: whichever should be faster.
        bucket_mb: Upper bound, in MiB, on the matrices that are orthogonalized together. ``auto``
            is 32 per rank where matrices are communicated, and 512 in one process on an
            accelerator, where launches dominate. One process on a CPU never takes more than 2²⁰
            elements, or one matrix.
        compile: Run the polar iteration through ``torch.compile``.
        cuda_graph: On one CUDA device, capture the work on matrices once and replay it. Helps with
            small matrices, where launches dominate; needs memory for a second set of gradients.

    Raises:
        ValueError: A name, type, range or combination that is not allowed. The message names the
            field, the value and what is allowed.
    """

    order: Order = "pre_polar"
    momentum: Momentum = 0.95
    momentum_weights: tuple[float, ...] | None = None
    nesterov: bool = True
    prefilter: Literal["none", "clip", "norm"] = "none"
    prefilter_threshold: float = 3.0
    filter: str = "ema"
    matrix_map: str = "polar"
    map_power: float = 0.0
    rescale: str = "none"
    rescale_beta: float = 0.95
    match_update_rms: bool = False
    polar_method: Literal["auto", "newton_schulz", "gram", "svd"] = "auto"
    coefficients: str = "tight"
    polar_steps: int = 5
    polar_dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    polar_kernel: Literal["auto", "torch", "triton", "quack"] = "auto"
    adjust_lr: Literal["match_rms_adamw", "original", "spectral", "none"] = "match_rms_adamw"
    lr: float | None = None
    adamw_lr: float | None = None
    lr_multipliers: tuple[str, ...] = ()
    weight_decay: float = 0.0
    adamw_weight_decay: float | None = None
    cautious_weight_decay: bool = False
    adamw_betas: tuple[float, float] = (0.9, 0.999)
    adamw_eps: float = 1e-8
    step_rule: Literal["additive", "hyperball", "relative"] = "additive"
    momentum_start: float | tuple[float, ...] | None = None
    momentum_warmup_steps: int = 0
    momentum_end: float | tuple[float, ...] | None = None
    momentum_cooldown_start: int = 0
    momentum_cooldown_steps: int = 0
    momentum_schedule: Literal["linear", "cosine"] = "linear"
    momentum_dtype: Literal["int8", "bfloat16", "float16", "float32", "float64"] | None = None
    muon_params: tuple[str, ...] = ()
    adamw_params: tuple[str, ...] = ()
    conv: Literal["adamw", "flatten"] = "adamw"
    split_fused: bool = False
    split_heads: bool = False
    lora_update: LoraUpdate = "factor"
    lora_damping: float = 1e-2
    tangent_iterations: int = 3
    tangent_balance_every: int = 100
    skip_zero_gradients: bool = False
    distribute: Literal["auto", "owner", "redundant"] = "auto"
    bucket_mb: float | Literal["auto"] = "auto"
    compile: bool = False
    cuda_graph: bool = False

    def __new__(cls, /, **settings: object) -> MuonConfig:
        """Raise for unknown names before the generated ``__init__`` raises a bare TypeError."""
        for name in settings:
            require_known(name, (field.name for field in dataclasses.fields(cls)), "setting")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Convert every value to its declared type, then check ranges and combinations."""
        if isinstance(self.lr_multipliers, Mapping):
            listed = [f"{pattern}:{factor}" for pattern, factor in self.lr_multipliers.items()]
            object.__setattr__(self, "lr_multipliers", tuple(listed))
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), hint))
        if isinstance(self.momentum, tuple) and len(self.momentum) == 1:
            object.__setattr__(self, "momentum", self.momentum[0])  # a single average
        check_settings(self)

    @classmethod
    def from_optim_args(cls, optim_args: str | None, **defaults: Any) -> MuonConfig:
        """Read the Trainer's ``optim_args``: ``key=value`` pairs separated by commas.

        Lists of numbers are separated by ``:`` (``adamw_betas=0.9:0.95``), lists of regexes by
        ``|`` outside brackets (``adamw_params=score|gate``, ``lr_multipliers=embed:0.5|score:2``).
        ``config=muon.json`` reads a file, whose values the other pairs override.

        Args:
            optim_args: The string, as the Trainer takes it. Spaces around names and values are
                ignored, spaces inside a value are part of it.
            **defaults: Values for settings that neither the string nor the file gives.
        """
        if not isinstance(optim_args, str | None):
            raise ValueError(
                f"optim_args={shown(optim_args)} is of type {type(optim_args).__name__}; a string "
                "of key=value pairs is expected, or config=FILE with the settings in a JSON file."
            )
        pairs: dict[str, str] = {}
        text = (optim_args or "").strip()
        for item in text.split(",") if text else ():
            name, _, value = (part.strip() for part in item.partition("="))
            if not (name and value):
                raise ValueError(
                    f"optim_args has {shown(item.strip())} where key=value is expected, in "
                    f"{shown(text)}. Separate pairs by commas, without one at the end; put values "
                    "that hold a comma into a JSON file and pass config=FILE."
                )
            inside = re.findall(r"[\s;](\w+)\s*=", value) if name != "config" else []
            if second := next((one for one in inside if one in get_type_hints(cls)), None):
                raise ValueError(
                    f"optim_args has {shown(item.strip())}, two settings in one pair: separate "
                    f"pairs by commas, as in {shown(name)[1:-1]}=…,{second}=…."
                )
            if name in pairs:
                raise ValueError(f"optim_args gives {shown(name)} twice, in {shown(text)}.")
            pairs[name] = value
        path = pairs.pop("config", None)
        from_file = read_json(path, "config=") if path is not None else {}
        return cls(**{**defaults, **from_file, **parsed(cls, pairs)})

    @classmethod
    def from_json(cls, path: str | Path) -> MuonConfig:
        """Read a JSON object of settings. The file is data: nothing in it is executed."""
        return cls(**read_json(path, "config="))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> MuonConfig:
        """Build from settings whose values may still be strings, as some launchers pass them."""
        strings = {name: value for name, value in settings.items() if isinstance(value, str)}
        return cls(**{**settings, **parsed(cls, strings)})

    @property
    def rule(self) -> Rule:
        """The update rule for these settings."""
        return rule_of(vars(self))

    @property
    def lr_factors(self) -> dict[str, float]:
        """The numbers of ``lr_multipliers`` by pattern, in their order."""
        return dict(with_factor("lr_multipliers", item) for item in self.lr_multipliers)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name; ``MuonConfig(**config.to_dict()) == config``."""
        return dataclasses.asdict(self)

    def muon_group(self, decay: bool = True) -> dict[str, Any]:
        """Hyper-parameters of a Muon group, as plain values."""
        return {
            "algorithm": "muon",
            "lr": self._required_lr(),
            "weight_decay": self.weight_decay if decay else 0.0,
            **{field: getattr(self, field) for field in _MUON_FIELDS},
            "momentum_start": self.momentum if self.momentum_start is None else self.momentum_start,
            "momentum_weights": self.momentum_weights or (),
            "momentum_end": self.momentum if self.momentum_end is None else self.momentum_end,
            "momentum_dtype": self.momentum_dtype or "parameter",
        }

    def adamw_group(self, decay: bool = True) -> dict[str, Any]:
        """Hyper-parameters of an AdamW group, under the names of torch's AdamW."""
        if self.adamw_lr is None and self.adjust_lr != "match_rms_adamw":
            raise ValueError(
                f"adamw_lr is not set, and adjust_lr={self.adjust_lr!r} gives lr a scale that does "
                "not suit AdamW. Set adamw_lr (optim_args: adamw_lr=3e-4), or use "
                "adjust_lr='match_rms_adamw', under which one learning rate serves both halves."
            )
        if self.adamw_lr is None and (self.step_rule, self.matrix_map) not in LIKE_ADAMW:
            warnings.warn(
                f"adamw_lr is not set, so that AdamW trains what is no matrix with lr={self.lr!r}. "
                f"Under step_rule={self.step_rule!r} and matrix_map={self.matrix_map!r} lr has "
                "another scale than AdamW's: set adamw_lr (optim_args: adamw_lr=3e-4).",
                stacklevel=2,
            )
        own_decay = self.adamw_weight_decay
        weight_decay = self.weight_decay if own_decay is None else own_decay
        return {
            "algorithm": "adamw",
            "lr": self._required_lr() if self.adamw_lr is None else self.adamw_lr,
            "betas": self.adamw_betas,
            "eps": self.adamw_eps,
            "weight_decay": weight_decay if decay else 0.0,
        }

    def _required_lr(self) -> float:
        if self.lr is None:
            raise ValueError("lr is not set: pass lr=…, or learning_rate to the Trainer.")
        return self.lr


# Step rules and maps under which one learning rate serves both halves.
LIKE_ADAMW = {("additive", name) for name in ("polar", "soft")}

_MUON_FIELDS = (
    "order", "momentum", "momentum_weights", "nesterov", "prefilter", "prefilter_threshold",
    "filter", "matrix_map", "map_power", "rescale", "rescale_beta", "match_update_rms", "step_rule",
    "momentum_warmup_steps", "momentum_cooldown_start", "momentum_cooldown_steps",
    "momentum_schedule", "polar_method", "coefficients", "polar_steps", "polar_dtype",
    "polar_kernel", "adjust_lr", "cautious_weight_decay", "lora_update", "lora_damping",
    "tangent_iterations", "tangent_balance_every", "skip_zero_gradients", "distribute", "bucket_mb",
    "compile",
)  # fmt: skip
