"""Muon: momentum and polar factor in a selectable order, with AdamW for what is not a matrix.

In: parameters in groups that name their algorithm, with gradients. Out: the parameters, changed in
place. A step reads everything it needs from ``self.param_groups`` and ``self.state``, because
launchers replace both the group dicts and the parameters in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, overload

import torch
from torch.optim.optimizer import Optimizer

from hf_muon.config import MuonConfig
from hf_muon.distributed.exchange import run_overlapped
from hf_muon.distributed.find import is_dtensor, replicate_ranks, sharing_ranks
from hf_muon.distributed.layout import Ranks
from hf_muon.optimizer.adamw import adamw_step
from hf_muon.optimizer.agreement import Agreement, agree_on_failure, check_placement
from hf_muon.optimizer.buffers import check_fit, check_state, new_state, restore
from hf_muon.optimizer.checkpoint import checked
from hf_muon.optimizer.entries import Entry, Group, Origins, trained_of
from hf_muon.optimizer.graphed import Graphed
from hf_muon.optimizer.groups import complete_group, make_plain, named_groups
from hf_muon.optimizer.launcher import (
    complete_state,
    is_rehearsal,
    settings_of,
    was_loaded,
    with_own_settings,
)
from hf_muon.optimizer.pairs import check_decay, check_trained, moves_pairs, taking_part
from hf_muon.optimizer.plans import Plan, Plans, facts_of, momenta_of
from hf_muon.optimizer.step import bucket_step
from hf_muon.polar import Workspace, check_kernel, polar_factor
from hf_muon.rules import check_rule, rule_of
from hf_muon.stages import Momentum


class Muon(Optimizer):
    """Muon with a selectable order of momentum and orthogonalization.

    With O the polar factor, F the momentum filter and s the step-size factor of a matrix::

        pre_polar    W ← (1 − lr·λ)W − lr·s·O(F(G))
        post_polar   W ← (1 − lr·λ)W − lr·s·F(O(G))
        polar_only   W ← (1 − lr·λ)W − lr·s·O(G)

    ``lora_update="product"`` and ``"tangent"`` replace O by a joint update of a LoRA adapter's A
    and B.

    Args:
        params: Matrices, or named matrices, or groups. A group is a dict with ``params`` and
            ``algorithm``, ``"muon"`` (default) or ``"adamw"``; other keys override the settings
            below. Tensors with three dimensions are stacks of matrices. Keys of other libraries
            (``lr_scale``) are kept. ``OneCycleLR`` and ``CyclicLR`` cycle ``momentum``, which is
            β in Muon's groups and β₁ in AdamW's.
        lr: Learning rate of the matrices, ≥ 0. A tensor is read once: schedulers write numbers.
        replicate_group: The ranks that hold copies of the plain tensors and share the work on them
            (``"world"``: all ranks, resolved at the first step). DTensors need none. Default: only
            this rank.
        config: All settings at once, instead of ``lr`` and ``settings``.
        **settings: Fields of :class:`~hf_muon.MuonConfig`.

    Raises:
        ValueError: A setting is not allowed, a group holds a parameter that its algorithm cannot
            train, or there is no matrix at all.
        TypeError: As in torch, for parameters in a set and for items that are not tensors.
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
        config: MuonConfig | None = None,
        **settings: Any,
    ) -> None:
        self.config = MuonConfig(lr=lr, **settings) if config is None else config
        if config is not None and (settings or lr is not None):
            raise ValueError(
                f"config is given together with {', '.join(['lr', *settings])}: give one of them."
            )
        if isinstance(replicate_group, str) and replicate_group != "world":
            raise ValueError(
                f"replicate_group={replicate_group!r}: a process group, 'world' or None is "
                "expected."
            )
        self.replicate_group = replicate_group
        self._origins = Origins()
        self._settings: list[Group] = []
        self._agreement = Agreement()
        self._forget()
        self.routes: dict[str, Any] | None = None  # set if a model was routed; for reports
        defaults = {"lr": self.config.muon_group()["lr"]}
        if isinstance(self.config.momentum, float):  # only then can a scheduler cycle it
            defaults["momentum"] = self.config.momentum
        super().__init__(named_groups(params), defaults)
        self._every_group = self.param_groups  # DeepSpeed replaces these by one group during a call
        _warn_of_low_precision(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or load; forget the plans made for other parameters."""
        super().__setstate__(state)
        self.__dict__.setdefault("_agreement", Agreement())
        self._forget()
        self.__dict__.setdefault("replicate_group", None)
        self._every_group = self.param_groups
        if "_origins" not in self.__dict__:  # a copy: its parameters are those it was built from
            self._origins, self._settings = Origins(), []
            for number, group in enumerate(self.param_groups):
                known = self.config.muon_group() if group["algorithm"] == "muon" else {}
                group.update({key: known[key] for key in known.keys() - group}, group_id=number)
                self._remember(group)
        self._origins.forget_flats()

    def _forget(self) -> None:
        """Plan and agree again before the next step."""
        self._plans, self._workspace, self._graphed = Plans(), Workspace(), Graphed()
        self._agreement.forget()
        self._is_checked = False  # whether a step has checked state that others may have edited

    @property
    def is_flattened(self) -> bool:
        """Whether the groups hold DeepSpeed's flat tensors; a step may then get a single group."""
        return self._origins.are_flattened

    def __getstate__(self) -> dict[str, Any]:
        """Keep the settings in copies and pickles, because ``add_param_group`` needs them."""
        kept: dict[str, Any] = {"config": self.config, "routes": self.routes}
        if isinstance(self.replicate_group, str):  # a process group cannot be copied
            kept["replicate_group"] = self.replicate_group
        return {**super().__getstate__(), **kept}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, completed with the optimizer's hyper-parameters."""
        group = {**complete_group(param_group, self.config), "group_id": len(self._settings)}
        if group["algorithm"] == "muon":
            first = group["params"][0]
            dtype = (first[1] if isinstance(first, tuple) else first).dtype
            check_rule(group, partial(polar_factor, method="svd"), dtype)
            check_kernel(group["polar_kernel"])
        keys = {*group, "param_names"}
        super().add_param_group(group)
        for key in self.param_groups[-1].keys() - keys:  # defaults of the other algorithm
            del self.param_groups[-1][key]
        self._remember(self.param_groups[-1])

    def _remember(self, group: Group) -> None:
        """Remember what launchers may replace in a group: its parameters and settings."""
        self._origins.add_group(group["params"])
        self._settings.append(settings_of(group))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step on every parameter that has a gradient on some rank."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = self._entries()
        if groups:
            members = self._members(groups)
            plans, problem = self._prepared(groups)
            facts = partial(facts_of, groups, self.state, plans)
            replicate = replicate_ranks(self.replicate_group)
            active = self._agreement.reach(groups, members, replicate, problem, facts)
            trained = [taking_part(entries, active) for entries in groups]
            self._train_matrices(plans, trained, members)
            for entries in trained:
                if entries and entries[0].group["algorithm"] == "adamw":
                    adamw_step(entries[0].group, self.state, [entry.tensor for entry in entries])
        return loss

    def _entries(self) -> list[list[Entry]]:
        """Return the entries of each group; none if DeepSpeed only wants memory allocated."""
        if self._origins.are_flattened:
            self._is_checked &= not was_loaded(self.param_groups, self._settings)
            self._settings = with_own_settings(self.param_groups, self._settings)
        groups = self._origins.entries(self.param_groups)
        return [] if is_rehearsal(list(chain(*groups)), self.state) else groups

    def _prepared(self, groups: list[list[Entry]]) -> tuple[list[Plan | None], Exception | None]:
        """Return the plan of each Muon group, with its state created and checked; or the error."""
        plans: list[Plan | None] = []
        try:
            self._check_copies(chain(*groups))
            check_decay(self.param_groups)
            self._check_momentum()
            self._create_state()
            for entries in groups:
                of_muon = entries if entries and entries[0].group["algorithm"] == "muon" else []
                if of_muon and moves_pairs(of_muon[0].group):
                    check_trained(of_muon)
                plans.append(self._plan(_trained(of_muon)))
        except Exception as error:  # the other ranks would wait
            return plans, error
        return plans, None

    def _check_copies(self, entries: Iterable[Entry]) -> None:
        """Raise if ranks hold plain tensors, and nobody said whether they are copies."""
        if self.replicate_group is not None or not _several_ranks():
            return
        for entry in entries:
            plain, group = entry.flat is None and not is_dtensor(entry.tensor), entry.group
            if plain and group["algorithm"] == "muon" and group["distribute"] != "redundant":
                raise ValueError(
                    "Several ranks train plain tensors. If all hold the same ones (DDP), pass "
                    "replicate_group=torch.distributed.group.WORLD, so that they share the "
                    "work; if not, distribute='redundant', so that each does its own."
                )

    def _check_momentum(self) -> None:
        """Raise if a scheduler that cycles momentum has replaced several β by one."""
        for group in self.param_groups:
            own = self._settings[group["group_id"]].get("momentum")
            if isinstance(own, str | tuple) and not isinstance(group["momentum"], type(own)):
                raise ValueError(
                    f"momentum={group['momentum']!r} was written over {own!r}, as OneCycleLR and "
                    "CyclicLR do: several averages, and 'auto', cannot be cycled. Pass "
                    "cycle_momentum=False, or give one number."
                )

    def _plan(self, entries: list[Entry]) -> Plan | None:
        if not entries:
            return None
        plan = self._plans.of(entries[0].group, entries, replicate_ranks(self.replicate_group))
        states = [self.state[entry.tensor] for entry in entries]
        if plan.refresh(states):
            for entry, state in zip(entries, states, strict=True):
                check_placement(entry, state.get("exp_avg"))
            plan.held(entries)  # raises here, before anything is written, if views are impossible
        return plan

    def _train_matrices(
        self, plans: list[Plan | None], trained: list[list[Entry]], members: list[Ranks]
    ) -> None:
        """Do one step of the Muon groups: all of it or, if a map fails, nothing."""
        chosen = [(plan, of) for plan, of in zip(plans, trained, strict=True) if plan and of]
        captures, is_alone = self.config.cuda_graph, not members
        if not (captures and self._graphed.step(chosen, self._workspace, is_alone=is_alone)):
            self._train_plainly(chosen, members)
        for plan, entries in chosen:
            plan.count(entries)

    def _train_plainly(self, chosen: list[tuple[Plan, list[Entry]]], members: list[Ranks]) -> None:
        guarded = any(plan.may_fail(of) for plan, of in chosen)
        copies = [pair for plan, _ in chosen if guarded for pair in plan.copies()]
        failures: list[Exception] = []
        for plan, entries in chosen:
            step = plan.step(entries, self._workspace)
            run_overlapped(bucket_step(held, step) for held in plan.held(entries))
            failures += step.failures
        error = failures[0] if failures else None
        if guarded:
            error = agree_on_failure(failures, members, chosen[0][0].buckets[0].device)
        if error is not None:
            for tensor, copy in copies:
                tensor.copy_(copy)
            raise error

    def _members(self, groups: list[list[Entry]]) -> list[Ranks]:
        """Return the groups of several ranks that must agree on a step, each once."""
        entries = list(chain(*groups))
        replicate = replicate_ranks(self.replicate_group)
        found = sharing_ranks([entry.tensor for entry in entries], replicate)
        found += [entry.flat.ranks for entry in entries if entry.flat is not None]
        return [ranks for ranks in dict.fromkeys(found) if ranks.size > 1]

    def _create_state(self) -> None:
        """Create the state of every trained tensor at the first step, with or without a gradient.

        Existing state must fit, which is checked before anything changes. This does not happen in
        ``__init__`` because accelerate replaces the parameters later. It covers all tensors because
        a checkpoint that lacks the state of a parameter cannot be resumed, including the groups
        that DeepSpeed leaves out of this call: it looks for their state after the first one.
        """
        groups = self._every_group if self._origins.are_flattened else self.param_groups
        check = check_fit if self._is_checked else check_state
        for entries in filter(None, self._origins.entries(groups)):  # some groups may have none
            group, states = entries[0].group, [self.state.get(entry.tensor) for entry in entries]
            known = [(entry, of) for entry, of in zip(entries, states, strict=True) if of]
            check(group, known)
            if len(known) < len(entries):
                for entry in _trained(entries):
                    if not self.state.get(entry.tensor):
                        self.state[entry.tensor].update(new_state(entry))
            for entry in entries:
                if entry.flat is not None:
                    complete_state(group, self.state[entry.tensor], entry.tensor)
        self._is_checked = True

    def momenta(self) -> dict[str, list[Momentum]]:
        """Return β of the next step for the matrices of each parameter, by parameter name.

        With several averages, one β each; with ``momentum="auto"``, the one in use.
        """
        found: dict[str, list[Momentum]] = {}
        for entry in chain(*self._origins.entries(self.param_groups)):
            if entry.group["algorithm"] == "muon" and (state := self.state.get(entry.tensor)):
                momenta = momenta_of(entry, state)
                for name, momentum in zip(entry.owners, momenta, strict=True):
                    found.setdefault(name, []).append(momentum)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups; values that schedulers wrote as NumPy types become plain."""
        state_dict = super().state_dict()
        for group in state_dict.get("param_groups", ()):
            make_plain(group)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer; its settings replace the current ones, as in torch.

        The user's hooks run first, and last, as torch documents.

        Raises:
            ValueError: The checkpoint has other routes, another order, settings that are not
                allowed, or state that does not fit. The message names the parameters, and nothing
                was changed.
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


def _several_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _trained(entries: list[Entry]) -> list[Entry]:
    """Return the entries that need state: launchers' tensors, and plain ones that are trained."""
    first = entries[0] if entries else None
    if first is None or moves_pairs(first.group) or first.flat is not None or first.is_copy:
        return entries
    return trained_of(entries)


def _warn_of_low_precision(groups: list[Group]) -> None:
    dtypes = {
        str(p.dtype).removeprefix("torch.")
        for group in groups
        if group["algorithm"] == "muon"
        and group["momentum_dtype"] == "parameter"
        and rule_of(group).buffers
        for p in group["params"]
    }
    for name in sorted(dtypes & {"bfloat16", "float16"}):
        parts = {"bfloat16": 256, "float16": 2048}[name]
        warnings.warn(
            f"Weights in pure {name} get a {name} momentum buffer, which drops contributions below "
            f"1/{parts} of its entries; in the weights themselves, decay of less than that a step "
            "rounds away. Set momentum_dtype='float32' to keep momentum, train weights in float32 "
            f"with mixed precision to keep decay, or set momentum_dtype='{name}' to silence this.",
            stacklevel=3,
        )
