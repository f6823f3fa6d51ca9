"""Muon: momentum and polar factor in a selectable order, with AdamW for what is not a matrix.

In: parameters in groups that name their algorithm, with gradients. Out: the parameters, changed in
place. Everything a step needs is read from ``self.param_groups`` and ``self.state``, because
launchers replace both the group dicts and the parameters in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_muon.config import MuonConfig
from hf_muon.distributed.layout import Matrix
from hf_muon.distributed.local import apply_to_matrices
from hf_muon.optimizer.adamw import adamw_step
from hf_muon.optimizer.adamw import new_state as new_adamw_state
from hf_muon.optimizer.apply import apply_update
from hf_muon.optimizer.checkpoint import check_routing, keep_momentum_dtype
from hf_muon.optimizer.gradients import active_parameters, check_finite, check_whole
from hf_muon.optimizer.groups import complete_group, named_groups
from hf_muon.optimizer.momentum import after, before, momentum_at
from hf_muon.optimizer.scaling import match_update_rms, step_size
from hf_muon.polar import orthogonalize

Group = dict[str, Any]


class Muon(Optimizer):
    """Muon with a selectable order of momentum and orthogonalization.

    With O the polar factor, F the momentum filter and s the step-size factor of a matrix::

        pre_polar    W ← (1 − lr·λ)W − lr·s·O(F(G))
        post_polar   W ← (1 − lr·λ)W − lr·s·F(O(G))
        polar_only   W ← (1 − lr·λ)W − lr·s·O(G)

    Args:
        params: Matrices, or named matrices, or groups. A group is a dict with ``params`` and
            ``algorithm``, ``"muon"`` (default) or ``"adamw"``; other keys override the settings
            below. Tensors with more than two dimensions are stacks of matrices.
        lr: Learning rate of the matrices, ≥ 0.
        **settings: Fields of :class:`~hf_muon.MuonConfig`.

    Raises:
        ValueError: A setting that is not allowed, a group that holds a parameter which its
            algorithm cannot train, or no matrix at all.
        FloatingPointError: From ``step``: a gradient is NaN or infinite. Parameters and state are
            as before the step.

    References:
        https://kellerjordan.github.io/posts/muon/; arXiv 2606.03899 (the orders).
    """

    def __init__(self, params: Iterable[Any], lr: float | None = None, **settings: Any) -> None:
        self.config = MuonConfig(lr=lr, **settings)
        self.routes: dict[str, Any] | None = None  # set where a model was routed; for reports
        super().__init__(named_groups(params), {"lr": self.config.muon_group()["lr"]})
        _warn_of_bfloat16_momentum(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the settings, which ``add_param_group`` needs."""
        return {**super().__getstate__(), "config": self.config, "routes": self.routes}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, its hyper-parameters completed from the settings of the optimizer."""
        super().add_param_group(complete_group(param_group, self.config))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Train every parameter that has a gradient by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._create_state()
        active = [active_parameters(group) for group in self.param_groups]
        check_finite(active, self.param_groups)
        for group, indices in zip(self.param_groups, active, strict=True):
            if group["algorithm"] == "muon":
                for bucket in _buckets(group, indices):
                    self._muon_step(group, bucket)
            else:
                adamw_step(group, self.state, [group["params"][i] for i in indices])
        return loss

    def _muon_step(self, group: Group, bucket: list[int]) -> None:
        """Filter, orthogonalize and apply, in the order of the group, for some of its matrices."""
        order, nesterov = group["order"], group["nesterov"]
        weights = [group["params"][i] for i in bucket]
        matrices = [[Matrix(*matrix) for matrix in group["matrices"][i]] for i in bucket]
        buffers = [self.state[w].get("exp_avg", w) for w in weights]
        betas = [self._momentum(group, w) for w in weights]

        inputs = [
            before(order, w.grad, m, beta, nesterov)
            for w, m, beta in zip(weights, buffers, betas, strict=True)
        ]
        factors = apply_to_matrices(inputs, matrices, _polar(group))
        updates = [
            after(order, o, m, beta, nesterov)
            for o, m, beta in zip(factors, buffers, betas, strict=True)
        ]
        for w, u, inside in zip(weights, updates, matrices, strict=True):
            _write(group, w, u, inside)
            self.state[w]["step"] = self.state[w]["step"] + 1

    def _momentum(self, group: Group, weight: Tensor) -> float:
        """β of this step for one parameter."""
        warmup, momentum = group["momentum_warmup_steps"], group["momentum"]
        if not warmup:
            return float(momentum)
        step = int(self.state[weight]["step"])
        return momentum_at(step, momentum, group["momentum_start"], warmup)

    def _create_state(self) -> None:
        """State of every parameter, with or without a gradient, at the first step.

        Not in ``__init__``, because accelerate replaces the parameters after it; for all, because
        a checkpoint that lacks the state of a parameter cannot be resumed.
        """
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if not self.state[p]:
                    check_whole(group, index)
                    self.state[p] = _new_state(group, p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer.

        Raises:
            ValueError: The checkpoint was trained with other routes or in another order; the
                message names the parameters.
        """
        check_routing(self.param_groups, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        keep_momentum_dtype(self, state_dict)


def _polar(group: Group) -> Callable[[Tensor], Tensor]:
    return partial(
        orthogonalize,
        method=group["polar_method"],
        coefficients=group["coefficients"],
        steps=group["polar_steps"],
        dtype=group["polar_dtype"],
        compile=group["compile"],
    )


def _new_state(group: Group, parameter: Tensor) -> dict[str, Tensor]:
    """Step count and, where the order has one, the momentum buffer M₀ = 0."""
    if group["algorithm"] == "adamw":
        return new_adamw_state(parameter, group["fused"])
    state = {"step": torch.zeros((), dtype=torch.float32)}
    if group["order"] != "polar_only":
        name = group["momentum_dtype"]
        dtype = parameter.dtype if name == "parameter" else getattr(torch, name)
        state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
    return state


# Up to this many elements a CPU orthogonalizes matrices faster in a batch than one by one, 64 × 256
# still 1.5 times; from 128 × 128 on it does not (scripts/bench/step.py --batching).
_CPU_BATCHED_ELEMENTS = 2**14


def _buckets(group: Group, indices: list[int]) -> Iterator[list[int]]:
    """Parameters whose matrices are orthogonalized together, same shapes side by side."""
    params = group["params"]
    limit = group["bucket_mb"] * 2**20 / torch.float32.itemsize
    bucket: list[int] = []
    filled = 0
    for index in sorted(indices, key=lambda i: (tuple(params[i].shape), i)):
        numel = params[index].numel()
        alone = params[index].device.type == "cpu" and numel > _CPU_BATCHED_ELEMENTS
        if bucket and (alone or filled + numel > limit):
            yield bucket
            bucket, filled = [], 0
        bucket.append(index)
        filled += limit if alone else numel
    if bucket:
        yield bucket


def _write(group: Group, weight: Tensor, update: Tensor, matrices: list[Matrix]) -> None:
    """Apply an update, each matrix with its own step size."""
    rule = group["adjust_lr"]
    settings = {
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "cautious": group["cautious_weight_decay"],
    }
    scales = [step_size(rule, matrix) for matrix in matrices]
    if len(set(scales)) == 1 and not group["match_update_rms"]:
        apply_update(weight, update, scale=scales[0], **settings)
        return
    update = update.contiguous()
    for matrix, scale in zip(matrices, scales, strict=True):
        u = matrix.view(update)
        if group["match_update_rms"]:
            u = match_update_rms(u.reshape(matrix.rows, matrix.cols)).view(matrix.shape)
        apply_update(matrix.view(weight), u, scale=scale, **settings)


def _warn_of_bfloat16_momentum(groups: list[Group]) -> None:
    dtypes = {
        p.dtype
        for group in groups
        if group["algorithm"] == "muon" and group["momentum_dtype"] == "parameter"
        for p in group["params"]
    }
    if torch.bfloat16 in dtypes:
        warnings.warn(
            "Weights in pure bfloat16 get a bfloat16 momentum buffer, which drops contributions "
            "below 1/256 of its entries. Set momentum_dtype='float32' to keep them, or "
            "momentum_dtype='bfloat16' to silence this warning.",
            stacklevel=3,
        )
