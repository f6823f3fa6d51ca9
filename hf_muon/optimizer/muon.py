"""Muon: momentum and polar factor in a selectable order, with AdamW for what is not a matrix.

In: parameters in groups that name their algorithm, with gradients. Out: the parameters, changed in
place. Everything a step needs is read from ``self.param_groups`` and ``self.state``, because
launchers replace both the group dicts and the parameters in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_muon.config import MuonConfig
from hf_muon.distributed.exchange import run_overlapped
from hf_muon.distributed.find import (
    is_dtensor,
    local,
    local_gradient,
    replicate_ranks,
    sharing_ranks,
)
from hf_muon.distributed.layout import Ranks
from hf_muon.optimizer.adamw import adamw_step
from hf_muon.optimizer.adamw import new_state as new_adamw_state
from hf_muon.optimizer.buffers import buffer_dtype, check_fit, check_state, restore
from hf_muon.optimizer.checkpoint import checked
from hf_muon.optimizer.deepspeed import complete_state, settings_of, with_own_settings
from hf_muon.optimizer.entries import Entry, Origins
from hf_muon.optimizer.gradients import agree_on_gradients, check_placement
from hf_muon.optimizer.groups import complete_group, make_plain, named_groups
from hf_muon.optimizer.momentum import momentum_at
from hf_muon.optimizer.pair_step import pair_step
from hf_muon.optimizer.pairs import check_decay, moves_pairs, taking_part
from hf_muon.optimizer.plans import Plans
from hf_muon.optimizer.step import Member, bucket_step
from hf_muon.polar import Workspace

Group = dict[str, Any]


class Muon(Optimizer):
    """Muon with a selectable order of momentum and orthogonalization.

    With O the polar factor, F the momentum filter and s the step-size factor of a matrix::

        pre_polar    W ← (1 − lr·λ)W − lr·s·O(F(G))
        post_polar   W ← (1 − lr·λ)W − lr·s·F(O(G))
        polar_only   W ← (1 − lr·λ)W − lr·s·O(G)

    ``lora_update="product"`` and ``"tangent"`` replace O by an update of the two factors of an
    adapter together.

    Args:
        params: Matrices, or named matrices, or groups. A group is a dict with ``params`` and
            ``algorithm``, ``"muon"`` (default) or ``"adamw"``; other keys override the settings
            below. Tensors with three dimensions are stacks of matrices. Keys of others
            (``lr_scale``) are kept; ``OneCycleLR`` and ``CyclicLR`` cycle ``momentum``, which is
            β of the matrices and β₁ of the AdamW half.
        lr: Learning rate of the matrices, ≥ 0. A tensor is read once: schedulers write numbers.
        replicate_group: The ranks that hold copies of the plain tensors and share the work on them
            (``"world"``: all, found at the first step). DTensors need none. Default: no others.
        **settings: Fields of :class:`~hf_muon.MuonConfig`.

    Raises:
        ValueError: A setting that is not allowed, a group that holds a parameter which its
            algorithm cannot train, or no matrix at all.
        TypeError: As in torch, for parameters in a set and for what is no tensor.
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
        self._origins = Origins()
        self._settings: list[Group] = []
        self._is_checked = False  # whether a step has looked at state that others may have left
        self._plans, self._workspace = Plans(), Workspace()
        self.routes: dict[str, Any] | None = None  # set where a model was routed; for reports
        defaults = {"lr": self.config.muon_group()["lr"], "momentum": self.config.momentum}
        super().__init__(named_groups(params), defaults)
        self._every_group = self.param_groups  # which DeepSpeed replaces by one of them for a call
        _warn_of_bfloat16_momentum(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or load: what was planned for other parameters is forgotten."""
        super().__setstate__(state)
        self._plans, self._workspace = Plans(), Workspace()
        self._is_checked = False
        self.__dict__.setdefault("replicate_group", None)
        self._every_group = self.param_groups
        if "_origins" not in self.__dict__:  # a copy; what it holds is what it was built from
            self._origins, self._settings = Origins(), []
            for number, group in enumerate(self.param_groups):
                known = self.config.muon_group() if group["algorithm"] == "muon" else {}
                group.update({key: known[key] for key in known.keys() - group}, group_id=number)
                self._remember(group)
        self._origins.forget_flats()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the settings, which ``add_param_group`` needs."""
        kept: dict[str, Any] = {"config": self.config, "routes": self.routes}
        if isinstance(self.replicate_group, str):  # a process group cannot be copied
            kept["replicate_group"] = self.replicate_group
        return {**super().__getstate__(), **kept}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, its hyper-parameters completed from the settings of the optimizer."""
        group = {**complete_group(param_group, self.config), "group_id": len(self._settings)}
        keys = {*group, "param_names"}
        super().add_param_group(group)
        for key in self.param_groups[-1].keys() - keys:  # defaults that are not of this algorithm
            del self.param_groups[-1][key]
        self._remember(self.param_groups[-1])

    def _remember(self, group: Group) -> None:
        """Keep what launchers may replace in a group: its parameters and settings."""
        self._origins.add_group(group["params"])
        self._settings.append(settings_of(group))

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

        check_decay(self.param_groups)
        if self._origins.are_flattened:
            self._settings = with_own_settings(self.param_groups, self._settings)
        groups = self._origins.entries(self.param_groups)
        entries = [entry for group in groups for entry in group]
        if self._is_rehearsal(entries):
            return loss
        self._create_state()
        replicate = self._replicate(entries)
        active = set(agree_on_gradients(entries, _sharing(entries, replicate)))
        trained = [taking_part(of_group, active) for of_group in groups]
        for group, members in zip(self.param_groups, trained, strict=True):
            if group["algorithm"] == "muon":
                self._muon_step(group, members, replicate)
            else:
                adamw_step(group, self.state, [entry.tensor for entry in members])
        return loss

    def _muon_step(self, group: Group, entries: list[Entry], replicate: Ranks) -> None:
        """One step on some matrices of a group, a few buckets at a time."""
        if not entries:
            return
        members = [self._member(entry) for entry in entries]
        buckets = self._plans.buckets(group, entries, replicate)
        one_step = pair_step if moves_pairs(group) else bucket_step
        run_overlapped(one_step(group, members, bucket, self._workspace) for bucket in buckets)
        for entry in entries:
            state = self.state[entry.tensor]
            state["step"] = state["step"] + 1  # not in place: loaders may share one tensor

    def _member(self, entry: Entry) -> Member:
        """What a step reads and writes of one tensor, on this rank."""
        group, state = entry.group, self.state[entry.tensor]
        beta, warmup = group["momentum"], group["momentum_warmup_steps"]
        if warmup:
            beta = momentum_at(int(state["step"]), beta, group["momentum_start"], warmup)
        gradient = local_gradient(entry.tensor)
        return Member(
            weight=local(entry.tensor),
            gradient=gradient,
            # polar_only has no buffer and reads none.
            exp_avg=gradient if group["order"] == "polar_only" else local(state["exp_avg"]),
            momentum=beta,
            matrices=entry.matrices,
            scalings=entry.scalings,
            step=state["step"],
        )

    def _replicate(self, entries: list[Entry]) -> Ranks:
        """The ranks that hold copies of plain tensors.

        Raises:
            ValueError: Several ranks hold plain tensors and nobody said whether they are copies.
        """
        if self.replicate_group is None and _several_ranks():
            for entry in entries:
                plain = entry.flat is None and not is_dtensor(entry.tensor)
                group = entry.group
                if plain and group["algorithm"] == "muon" and group["distribute"] != "redundant":
                    raise ValueError(
                        "Several ranks train plain tensors. If all hold the same ones (DDP), pass "
                        "replicate_group=torch.distributed.group.WORLD, so that they share the "
                        "work; if not, distribute='redundant', so that each does its own."
                    )
        return replicate_ranks(self.replicate_group)

    def _create_state(self) -> None:
        """State of every trained tensor, with or without a gradient, at the first step.

        What is there already must fit, before anything moves. Not in ``__init__``, because
        accelerate replaces the parameters after it; for all, because a checkpoint that lacks the
        state of a parameter cannot be resumed. Also for groups that DeepSpeed leaves out of this
        call: it looks for their state after the first one.
        """
        groups = self._every_group if self._origins.are_flattened else self.param_groups
        for entry in chain.from_iterable(self._origins.entries(groups)):
            state = self.state.get(entry.tensor, {})
            if entry.group["algorithm"] == "muon":
                check_placement(entry, state)
            if state:
                check = check_fit if self._is_checked else check_state
                check(entry, state)
            elif _is_trained(entry):
                state = self.state[entry.tensor]
                state.update(_new_state(entry.group, entry.tensor))
            if entry.flat is not None:
                complete_state(entry.group, state, entry.tensor)
        self._is_checked = True

    def _is_rehearsal(self, entries: list[Entry]) -> bool:
        """Whether DeepSpeed only wants to see memory allocated; such a step must do nothing.

        Its stage 0 in half precision steps once on zero gradients when it is built (0.19); that
        would decay the weights and count a step.
        """
        copies = [entry for entry in entries if entry.is_copy]
        fresh = bool(copies) and not any(self.state[entry.tensor] for entry in entries)
        return fresh and not any(_is_nonzero(entry.tensor.grad) for entry in entries)

    def state_dict(self) -> dict[str, Any]:
        """The state and groups; what schedulers wrote in NumPy's types is plain."""
        state_dict = super().state_dict()
        for group in state_dict.get("param_groups", ()):
            make_plain(group)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer; its settings are used, as everywhere in torch.

        The user's hooks run first, and last, as torch documents.

        Raises:
            ValueError: It was trained with other routes, in another order, or with settings that
                are not allowed, or its state does not fit; the message names the parameters, and
                nothing was changed.
        """
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(checked(self.param_groups, given, bool(self.state)))
            return loaded

        def finish(_: Optimizer) -> None:
            restore(self.param_groups, self.state, loaded)
            for group in self.param_groups:
                self._settings[group["group_id"]] = settings_of(group)

        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}; a dict is expected.")
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(finish, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _sharing(entries: list[Entry], replicate: Ranks) -> list[Ranks]:
    """The groups of ranks that must agree on a step."""
    flats = {entry.flat.ranks: None for entry in entries if entry.flat is not None}
    return [*sharing_ranks((entry.tensor for entry in entries), replicate), *flats]


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _several_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _is_trained(entry: Entry) -> bool:
    """Whether it needs state; launchers' own tensors do, and plain ones that are not frozen."""
    tensor = entry.tensor
    own = entry.flat is None and not entry.is_copy
    return not own or tensor.requires_grad or tensor.grad is not None


def _new_state(group: Group, parameter: Tensor) -> dict[str, Tensor]:
    """Step count and, where the order has one, the momentum buffer M₀ = 0."""
    if group["algorithm"] == "adamw":
        return new_adamw_state(parameter)
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    if group["order"] != "polar_only":
        state["exp_avg"] = torch.zeros_like(parameter, dtype=buffer_dtype(group, parameter))
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
