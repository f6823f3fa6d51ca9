"""Muon: momentum and polar factor in a selectable order, with AdamW for what is not a matrix.

In: parameters in groups that name their algorithm, with gradients. Out: the parameters, changed in
place. Everything a step needs is read from ``self.param_groups`` and ``self.state``, because
launchers replace both the group dicts and the parameters in them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_muon.config import MuonConfig
from hf_muon.distributed.buckets import Bucket, plan_buckets
from hf_muon.distributed.exchange import run_overlapped
from hf_muon.distributed.find import (
    find_layout,
    is_dtensor,
    local,
    local_gradient,
    replicate_ranks,
)
from hf_muon.distributed.layout import ALONE, Layout, Matrix, Ranks
from hf_muon.distributed.owners import owning_pays
from hf_muon.optimizer.adamw import adamw_step
from hf_muon.optimizer.adamw import new_state as new_adamw_state
from hf_muon.optimizer.checkpoint import check_routing, keep_momentum_dtype, with_plain_groups
from hf_muon.optimizer.gradients import agree_on_gradients, check_placement, parameter_name
from hf_muon.optimizer.groups import complete_group, named_groups
from hf_muon.optimizer.momentum import momentum_at
from hf_muon.optimizer.step import Member, bucket_step, wire_dtype

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
        replicate_group: The ranks that hold copies of the plain tensors and share the work on them
            (``"world"``: all, found at the first step). DTensors need none. Default: no others.
        **settings: Fields of :class:`~hf_muon.MuonConfig`.

    Raises:
        ValueError: A setting that is not allowed, a group that holds a parameter which its
            algorithm cannot train, or no matrix at all.
        FloatingPointError: From ``step``: a gradient is NaN or infinite. Parameters and state are
            as before the step.

    References:
        https://kellerjordan.github.io/posts/muon/; arXiv 2606.03899 (the orders).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        *,
        replicate_group: torch.distributed.ProcessGroup | str | None = None,
        **settings: Any,
    ) -> None:
        self.config = MuonConfig(lr=lr, **settings)
        if isinstance(replicate_group, str) and replicate_group != "world":
            raise ValueError(
                f"replicate_group={replicate_group!r}: a process group, 'world' or None is "
                "expected."
            )
        self.replicate_group = replicate_group
        self._layouts: dict[Any, Layout] = {}
        self._plans: dict[Any, list[Bucket]] = {}
        self.routes: dict[str, Any] | None = None  # set where a model was routed; for reports
        super().__init__(named_groups(params), {"lr": self.config.muon_group()["lr"]})
        _warn_of_bfloat16_momentum(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or load: what was planned for other parameters is forgotten."""
        super().__setstate__(state)
        self._layouts, self._plans = {}, {}
        self.__dict__.setdefault("replicate_group", None)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the settings, which ``add_param_group`` needs."""
        kept: dict[str, Any] = {"config": self.config, "routes": self.routes}
        if isinstance(self.replicate_group, str):  # a process group cannot be copied
            kept["replicate_group"] = self.replicate_group
        return {**super().__getstate__(), **kept}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, its hyper-parameters completed from the settings of the optimizer."""
        super().add_param_group(complete_group(param_group, self.config))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Train every parameter that has a gradient on any rank by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._create_state()
        replicate = self._replicate()
        active = agree_on_gradients(self.param_groups, replicate)
        for group, indices in zip(self.param_groups, active, strict=True):
            if group["algorithm"] == "muon":
                self._muon_step(group, indices, replicate)
            else:
                adamw_step(group, self.state, [group["params"][i] for i in indices])
        return loss

    def _muon_step(self, group: Group, indices: list[int], replicate: Ranks) -> None:
        """One step on some matrices of a group, a few buckets at a time."""
        if not indices:
            return
        members = [self._member(group, index) for index in indices]
        buckets = self._buckets(group, indices, replicate)
        run_overlapped(bucket_step(group, members, bucket) for bucket in buckets)
        for index in indices:
            state = self.state[group["params"][index]]
            state["step"] = state["step"] + 1  # not in place: loaders may share one tensor

    def _member(self, group: Group, index: int) -> Member:
        """What a step reads and writes of one parameter, on this rank."""
        parameter = group["params"][index]
        state = self.state[parameter]
        beta, warmup = group["momentum"], group["momentum_warmup_steps"]
        if warmup:
            beta = momentum_at(int(state["step"]), beta, group["momentum_start"], warmup)
        gradient = local_gradient(parameter)
        return Member(
            weight=local(parameter),
            gradient=gradient,
            # polar_only has no buffer and reads none.
            exp_avg=gradient if group["order"] == "polar_only" else local(state["exp_avg"]),
            momentum=beta,
            matrices=[Matrix(*matrix) for matrix in group["matrices"][index]],
        )

    def _buckets(self, group: Group, indices: list[int], replicate: Ranks) -> list[Bucket]:
        """The plan for these parameters; made once for each set of layouts."""
        layouts = [self._layout(group, index, replicate) for index in indices]
        devices = [local(group["params"][index]).device for index in indices]
        # The layouts are kept, so that their ids stay theirs.
        key = (tuple(map(id, layouts)), tuple(devices), group["bucket_mb"])
        if key not in self._plans:
            wire = wire_dtype(group, group["params"][indices[0]])
            limit = int(group["bucket_mb"] * 2**20 / wire.itemsize)
            self._plans[key] = plan_buckets(layouts, devices, limit)
        return self._plans[key]

    def _layout(self, group: Group, index: int, replicate: Ranks) -> Layout:
        """Where the matrices of a parameter are; found once for each kind of parameter."""
        parameter, matrices = group["params"][index], group["matrices"][index]
        placing = (parameter.device_mesh, parameter.placements) if is_dtensor(parameter) else None
        has_copies = placing is not None or replicate.size > 1
        divides = has_copies and _divides(group, parameter, matrices)
        key = (tuple(parameter.shape), placing, matrices, divides)
        if key not in self._layouts:
            inside = [Matrix(*matrix) for matrix in matrices]
            found = find_layout(parameter, inside, parameter_name(group, index), replicate)
            self._layouts[key] = found if divides else dataclasses.replace(found, replicate=ALONE)
        return self._layouts[key]

    def _replicate(self) -> Ranks:
        """The ranks that hold copies of plain tensors.

        Raises:
            ValueError: Several ranks hold plain tensors and nobody said whether they are copies.
        """
        if self.replicate_group is None and _several_ranks():
            for group in self.param_groups:
                divided = group["algorithm"] == "muon" and group["distribute"] != "redundant"
                if divided and not all(map(is_dtensor, group["params"])):
                    raise ValueError(
                        "Several ranks train plain tensors. If all hold the same ones (DDP), pass "
                        "replicate_group=torch.distributed.group.WORLD, so that they share the "
                        "work; if not, distribute='redundant', so that each does its own."
                    )
        return replicate_ranks(self.replicate_group)

    def _create_state(self) -> None:
        """State of every parameter, with or without a gradient, at the first step.

        Not in ``__init__``, because accelerate replaces the parameters after it; for all, because
        a checkpoint that lacks the state of a parameter cannot be resumed.
        """
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                check_placement(group, index, self.state[p])
                if not self.state[p]:
                    self.state[p] = _new_state(group, p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer.

        Raises:
            ValueError: The checkpoint was trained with other routes or in another order; the
                message names the parameters.
        """
        state_dict = with_plain_groups(state_dict)
        check_routing(self.param_groups, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        keep_momentum_dtype(self, state_dict)
        for state in self.state.values():  # torch keeps the checkpoint's own tensor
            if "step" in state:
                state["step"] = state["step"].clone()


def _divides(group: Group, parameter: Tensor, matrices: Sequence[Any]) -> bool:
    """Whether ranks that hold copies divide the work on a parameter among them."""
    if group["distribute"] != "auto" or not matrices:
        return bool(group["distribute"] != "redundant")
    matrix = Matrix(*matrices[0])
    itemsize, device = wire_dtype(group, parameter).itemsize, parameter.device.type
    return owning_pays(matrix.rows, matrix.cols, group["polar_steps"], itemsize, device)


def _several_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


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


def _warn_of_bfloat16_momentum(groups: list[Group]) -> None:
    dtypes = {
        p.dtype
        for group in groups
        if group["algorithm"] == "muon"
        and group["momentum_dtype"] == "parameter"
        and group["order"] != "polar_only"
        for p in group["params"]
    }
    if torch.bfloat16 in dtypes:
        warnings.warn(
            "Weights in pure bfloat16 get a bfloat16 momentum buffer, which drops contributions "
            "below 1/256 of its entries. Set momentum_dtype='float32' to keep them, or "
            "momentum_dtype='bfloat16' to silence this warning.",
            stacklevel=3,
        )
