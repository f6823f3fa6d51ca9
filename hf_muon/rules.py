"""The update rule as a table: what runs before the polar factor, in its place, and after it.

In: settings. Out: a :class:`Rule`, which the step follows, and from which states, checkpoints,
replays and reports are derived. A prefilter P, a filter F, a map S, a rescaling R and a step rule
are named entries, and ``order`` composes them::

    pre_polar    before = P, F    whole = S    after = R
    post_polar   before = P       whole = S    after = F, R
    polar_only   before = P       whole = S    after = R

Names that a user registers are valid wherever settings are: ``register_filter("clipped", …)``, then
``optim_args="filter=clipped"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_muon.stages import (
    NORMS,
    Buffer,
    Given,
    Rule,
    Run,
    Stage,
    Statistic,
    Tensors,
    WholeMap,
    concluded,
)

PREFILTERS: dict[str, tuple[Stage, ...]] = {"none": ()}
FILTERS: dict[str, Stage] = {}
KERNELS: dict[str, Callable[[int, str], Stage]] = {}
"""Filters of several terms by name, from their number and the name of the second buffer."""
MAPS: dict[str, WholeMap] = {}
PAIR_MAPS: dict[str, WholeMap] = {}
RESCALES: dict[str, tuple[Stage, ...]] = {"none": ()}
WRITES: dict[str, Stage] = {}
_OF_PACKAGE = {
    "ema", "kernel", "auto", "polar", "polargrad", "soft", "product", "tangent", "none",
    "frobenius", "rows", "entries",
}  # fmt: skip

_Entry = TypeVar("_Entry")
__all__ = ["Buffer", "Given", "Statistic", "register_filter", "register_map", "register_rescale"]


def register_filter(
    name: str, run: Run, buffers: Sequence[Buffer] = (Buffer("exp_avg"),), needs: Any = "entries"
) -> None:
    """Make a filter a valid value of ``filter``.

    Every process that trains with it, or reads a checkpoint of it, must register it. Your own names
    can be registered again; the package's names cannot.

    Args:
        name: A Python identifier, so that it can be used in ``optim_args``.
        run: See :class:`Stage`.
        buffers: The state that it keeps. Default: one average of the entries.
        needs: See :class:`Stage`.

    Raises:
        ValueError: The name is taken or not an identifier, or ``needs`` does not fit the buffers.
    """
    _register(FILTERS, name, _stage(name, run, buffers, needs))


def register_map(name: str, run: Callable[..., Tensor]) -> None:
    """Make a function of whole matrices a valid ``matrix_map``; see :func:`register_filter`."""
    _register(MAPS, name, WholeMap(run))


def register_rescale(
    name: str, run: Run, buffers: Sequence[Buffer] = (), needs: Any = "entries"
) -> None:
    """Make a rescaling of updates a valid value of ``rescale``; see :func:`register_filter`."""
    _register(RESCALES, name, (_stage(name, run, buffers, needs),))


def _stage(name: str, run: Run, buffers: Sequence[Buffer], needs: Any) -> Stage:
    if needs not in ("entries", "norms", "matrices") and not isinstance(needs, Statistic):
        raise ValueError(
            f"{name}: needs={needs!r} is not 'entries', 'norms', 'matrices' or a Statistic."
        )
    if needs in ("entries", "norms") and any(buffer.kind != "entries" for buffer in buffers):
        raise ValueError(
            f"{name} keeps numbers for rows or matrices, which takes needs='matrices' or a "
            "Statistic."
        )
    return Stage(run, tuple(buffers), NORMS if needs == "norms" else needs)


def _register(table: dict[str, _Entry], name: str, entry: _Entry) -> None:
    if not (isinstance(name, str) and name.isidentifier()) or name in _OF_PACKAGE:
        raise ValueError(
            f"A rule cannot be registered as {name!r}: a Python identifier is expected, and none "
            f"of the package's own names ({', '.join(sorted(_OF_PACKAGE))})."
        )
    table[name] = entry
    _composed.cache_clear()


def rule_of(settings: Mapping[str, Any]) -> Rule:
    """Return the rule for some settings, or for a param group.

    Raises:
        ValueError: A name is not registered in this process, or two buffers have the same name.
    """
    rescale = "frobenius" if settings["match_update_rms"] else settings["rescale"]
    momentum = settings["momentum"]
    terms = len(momentum) if isinstance(momentum, tuple) else 1
    return _composed(
        settings["order"], settings["prefilter"], settings["filter"],
        "auto" if momentum == "auto" else terms, settings["matrix_map"], rescale,
        settings["lora_update"], settings["step_rule"],
    )  # fmt: skip


def asks_the_host(settings: Mapping[str, Any]) -> str | None:
    """Return the setting that makes a step read from the device, count, or be undone, if any."""
    rule = rule_of(settings)
    filters = "momentum" if settings["momentum"] == "auto" else "filter"
    names = {WRITES[settings["step_rule"]]: "step_rule"}
    names |= dict.fromkeys(PREFILTERS[settings["prefilter"]], "prefilter")
    names |= dict.fromkeys(RESCALES[settings["rescale"]], "rescale")
    found = [names.get(one, filters) for one in rule.stages if one.counts or one.may_fail]
    found += ["matrix_map"] if rule.whole.may_fail else []
    found += ["skip_zero_gradients"] if settings["skip_zero_gradients"] else []
    found += ["polar_method"] if settings["polar_method"] == "svd" else []
    return f"{found[0]}={settings[found[0]]!r}" if found else None


def kept_by(settings: Mapping[str, Any]) -> tuple[Buffer, ...]:
    """Return the state of each matrix: the buffers of its rule, and for int8 their scales."""
    buffers = rule_of(settings).buffers
    if settings["momentum_dtype"] != "int8":
        return buffers
    return (*buffers, *(buffer.sizes for buffer in buffers if buffer.sizes is not None))


@lru_cache(maxsize=256)
def _composed(
    order: str, prefilter: str, filter: str, terms: int | str, matrix_map: str, rescale: str,
    lora_update: str, step_rule: str,
) -> Rule:  # fmt: skip
    after = _registered("rescale", rescale, RESCALES)
    smooth = (_smoothing(filter, terms, after),)
    whole = _registered("matrix_map", matrix_map, MAPS)
    write = WRITES[step_rule]
    if lora_update != "factor":
        whole = _registered("lora_update", lora_update, PAIR_MAPS)
        write = WRITES["change"]
    rule = Rule(
        before=(*PREFILTERS[prefilter], *(smooth if order == "pre_polar" else ())),
        whole=whole,
        after=(*(smooth if order == "post_polar" else ()), *after),
        write=write,
    )
    names = ["step", *(buffer.name for buffer in rule.buffers)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"filter={filter!r} and rescale={rescale!r} keep buffers of one name, or one called "
            f"'step': {', '.join(names[1:])}. Register them with different names."
        )
    return rule


def _smoothing(name: str, terms: int | str, after: Sequence[Stage]) -> Stage:
    """Return the filter: several averages if β has several values, or is ``auto``."""
    if terms == 1:
        return _registered("filter", name, FILTERS)
    if name != "ema":
        raise ValueError(
            f"filter={name!r} takes one β: 'auto' and momentum with several numbers are a kernel "
            "of averages, which filter='ema' makes."
        )
    taken = {buffer.name for stage in after for buffer in stage.buffers}
    second = "exp_avg_2" if "exp_avg_sq" in taken else "exp_avg_sq"
    if isinstance(terms, str):
        return KERNELS[terms](0, second)
    return KERNELS["kernel"](terms, second)


def _registered(setting: str, name: str, table: dict[str, _Entry]) -> _Entry:
    if name not in table:
        raise ValueError(
            f"{setting}={name!r} is not registered in this process, only {', '.join(table)}. "
            "Register it (hf_muon.rules) before the optimizer is built."
        )
    return table[name]


def check_rule(
    settings: Mapping[str, Any], polar: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Try registered functions on small matrices, so that errors show before training.

    Args:
        settings: Of the param group.
        polar: A polar factor for the check; the settings may ask for one on an accelerator.
        dtype: Of the parameters and so of gradients; buffers have ``momentum_dtype``.

    Raises:
        ValueError: A stage or map returns another shape or no floating-point numbers, or changes
            its input.
    """
    if {settings["filter"], settings["matrix_map"], settings["rescale"]} <= _OF_PACKAGE:
        return
    rule = rule_of(settings)
    shapes = [(4, 6), (6, 4)]
    x = [torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes]
    chosen = settings["momentum_dtype"]
    kept_in = dtype if chosen == "parameter" else getattr(torch, chosen)
    for stage in (*rule.before, *rule.after):
        kept = tuple(
            [_zeros(buffer, shape, kept_in) for shape in shapes] for buffer in stage.buffers
        )
        given = Given(settings, settings["momentum"], shapes, steps=[1] * len(x))
        given = given._replace(whole=concluded(stage, x, kept, given))
        _check_result(stage.run, x, stage.run(x, kept, given))
    if not rule.whole.of_pairs:
        run = rule.whole.run
        _check_result(run, x, [run(one, polar, settings) for one in x])


def _zeros(buffer: Buffer, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if buffer.kind == "entries":
        found = torch.float32 if dtype == torch.int8 else dtype
        return torch.zeros(shape, dtype=buffer.dtype or found, device="cpu")
    sides = (shape[0], 1) if buffer.kind == "rows" else (buffer.length,)
    return torch.zeros(sides, dtype=buffer.dtype or torch.float32, device="cpu")


def _check_result(run: Callable[..., Any], x: Tensors, found: Any) -> None:
    name = getattr(run, "__name__", repr(run))
    fits = isinstance(found, list) and len(found) == len(x)
    for one, result in zip(x, found, strict=True) if fits else ():
        fits &= isinstance(result, Tensor) and result.shape == one.shape
        fits = fits and result.is_floating_point()
    if not fits:
        raise ValueError(
            f"{name}, which is registered for the update rule, does not give a floating-point "
            "tensor of the same shape for each that it gets."
        )
    if not all(bool((one == 1).all()) for one in x):
        raise ValueError(
            f"{name}, which is registered for the update rule, changes its input: it may write its "
            "buffers only."
        )
