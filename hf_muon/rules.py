"""The update rule as a table: what stands before the polar factor, in its place, and after it.

In: settings. Out: a :class:`Rule`, which the step walks, and from which states, checkpoints,
replays and reports learn what there is. A filter F, a map S and a rescaling R are entries by name,
and ``order`` composes them::

    pre_polar    before = F    whole = S    after = R
    post_polar   before = –    whole = S    after = F, R
    polar_only   before = –    whole = S    after = R

Names that a user registers are valid wherever settings are: ``register_filter("clipped", …)``, then
``optim_args="filter=clipped"``. Stages work on lists of tensors, because a call for each would take
longer than its arithmetic where matrices are small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor


class Buffer(NamedTuple):
    """What a stage keeps of each parameter from step to step; it begins with zeros.

    Attributes:
        name: Its key in the state. DeepSpeed's universal checkpoints hold ``exp_avg`` and
            ``exp_avg_sq`` only; its ordinary ones hold any.
        kind: ``entries``: a number for each entry of a matrix; ``rows``: (m, 1) for each matrix.
        dtype: None: what ``momentum_dtype`` says for entries, float32 for rows.
    """

    name: str
    kind: Literal["entries", "rows"] = "entries"
    dtype: torch.dtype | None = None


class Given(NamedTuple):
    """What a stage is told beside its tensors.

    Attributes:
        settings: Of the param group.
        momentum: β of this step.
        shapes: (m, n) of the whole matrix that each tensor is a part of.
        norms: Frobenius norms of the whole matrices, float64, if the stage needs them.
    """

    settings: Mapping[str, Any]
    momentum: float
    shapes: Sequence[tuple[int, int]] = ()
    norms: Sequence[Tensor] = ()


Tensors = list[Tensor]
Run = Callable[[Tensors, tuple[Tensors, ...], Given], Tensors]


class Stage(NamedTuple):
    """Elementwise work on the pieces of matrices that a rank holds.

    Attributes:
        run: ``run(x, buffers, given)`` gives a tensor for each of x, (rows, cols) each, and may
            return buffers themselves. It writes the buffers, for each of which it gets a list
            aligned with x, and nothing else.
        buffers: What it keeps.
        needs: ``entries``: nothing but them; ``norms``: those of the whole matrices, in
            ``given.norms``; ``matrices``: whole matrices as x, which it only gets where every rank
            holds them whole (one process, DDP). Buffers of rows need them.
        may_fail: Whether it may raise; see :class:`WholeMap`.
    """

    run: Run
    buffers: tuple[Buffer, ...] = ()
    needs: Literal["entries", "norms", "matrices"] = "entries"
    may_fail: bool = True


class WholeMap(NamedTuple):
    """What is made of whole matrices by their owner.

    Attributes:
        run: ``run(X, polar, settings)`` gives a tensor of the shape of X, (m, n); ``polar(X)`` is
            the polar factor as the settings ask for it. Of pairs:
            ``run(weights, gradients, size, polar, settings)`` gives the changes of both factors.
        of_pairs: Whether it moves LoRA factors in pairs.
        balances: Whether the factors of a pair are brought to one norm now and then.
        replaces: Whether it is the polar factor: ``polar`` may then write over X, and X may be a
            batch (k, m, n), with transposes among them.
        may_fail: Whether it may raise for finite input. The step then keeps copies of what it
            writes, so that it is all or nothing.
    """

    run: Callable[..., Any]
    of_pairs: bool = False
    balances: bool = False
    replaces: bool = False
    may_fail: bool = True


class Rule(NamedTuple):
    """An update rule."""

    before: tuple[Stage, ...]
    whole: WholeMap
    after: tuple[Stage, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those before the map and those after it."""
        return (*self.before, *self.after)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """What all stages keep."""
        return tuple(buffer for stage in self.stages for buffer in stage.buffers)

    @property
    def may_fail(self) -> bool:
        """Whether the map or a stage may raise for finite input."""
        return self.whole.may_fail or any(stage.may_fail for stage in self.stages)


FILTERS: dict[str, Stage] = {}
MAPS: dict[str, WholeMap] = {}
PAIR_MAPS: dict[str, WholeMap] = {}
RESCALES: dict[str, tuple[Stage, ...]] = {"none": ()}
_OF_PACKAGE = {"ema", "polar", "product", "tangent", "none", "frobenius"}

_Entry = TypeVar("_Entry")


def register_filter(
    name: str, run: Run, buffers: Sequence[Buffer] = (Buffer("exp_avg"),), needs: Any = "entries"
) -> None:
    """Make a filter a valid value of ``filter``.

    Every process that trains, or reads a checkpoint of it, has to register it. A name of one's own
    can be registered again; those of the package cannot.

    Args:
        name: A Python identifier, so that it can stand in ``optim_args``.
        run: See :class:`Stage`.
        buffers: What it keeps. Default: one average of the entries.
        needs: See :class:`Stage`.

    Raises:
        ValueError: A name that is taken or cannot be one, or needs that do not fit the buffers.
    """
    _register(FILTERS, name, _stage(name, run, buffers, needs))


def register_map(name: str, run: Callable[..., Tensor]) -> None:
    """Make a map of whole matrices a valid value of ``matrix_map``; see :func:`register_filter`."""
    _register(MAPS, name, WholeMap(run))


def register_rescale(
    name: str, run: Run, buffers: Sequence[Buffer] = (), needs: Any = "entries"
) -> None:
    """Make a rescaling of updates a valid value of ``rescale``; see :func:`register_filter`."""
    _register(RESCALES, name, (_stage(name, run, buffers, needs),))


def _stage(name: str, run: Run, buffers: Sequence[Buffer], needs: Any) -> Stage:
    if needs not in ("entries", "norms", "matrices"):
        raise ValueError(f"{name}: needs={needs!r} is not 'entries', 'norms' or 'matrices'.")
    if needs != "matrices" and any(buffer.kind == "rows" for buffer in buffers):
        raise ValueError(f"{name} keeps numbers for rows, which takes needs='matrices'.")
    return Stage(run, tuple(buffers), needs)


def _register(table: dict[str, _Entry], name: str, entry: _Entry) -> None:
    if not (isinstance(name, str) and name.isidentifier()) or name in _OF_PACKAGE:
        raise ValueError(
            f"A rule cannot be registered as {name!r}: a Python identifier is expected, and none "
            f"of the package's own names ({', '.join(sorted(_OF_PACKAGE))})."
        )
    table[name] = entry
    _composed.cache_clear()


def rule_of(settings: Mapping[str, Any]) -> Rule:
    """The rule that some settings, or a param group, ask for.

    Raises:
        ValueError: A name that nobody has registered in this process, or buffers of one name.
    """
    rescale = "frobenius" if settings["match_update_rms"] else settings["rescale"]
    names = settings["filter"], settings["matrix_map"], rescale, settings["lora_update"]
    return _composed(settings["order"], *names)


@lru_cache(maxsize=256)
def _composed(order: str, filter: str, matrix_map: str, rescale: str, lora_update: str) -> Rule:
    smooth = (_registered("filter", filter, FILTERS),)
    whole = _registered("matrix_map", matrix_map, MAPS)
    if lora_update != "factor":
        whole = _registered("lora_update", lora_update, PAIR_MAPS)
    rule = Rule(
        before=smooth if order == "pre_polar" else (),
        whole=whole,
        after=(
            *(smooth if order == "post_polar" else ()),
            *_registered("rescale", rescale, RESCALES),
        ),
    )
    names = ["step", *(buffer.name for buffer in rule.buffers)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"filter={filter!r} and rescale={rescale!r} keep buffers of one name, or one called "
            f"'step': {', '.join(names[1:])}. Register them with different names."
        )
    return rule


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
    """Try what users have registered on small matrices, so that faults show before training.

    Args:
        settings: Of the param group.
        polar: The polar factor; not as the settings ask for it, which may be for an accelerator.
        dtype: Of the parameters and so of gradients; that of buffers is ``momentum_dtype``.

    Raises:
        ValueError: A stage or map gives other shapes, no floating-point numbers, or changes its
            input.
    """
    if {settings["filter"], settings["matrix_map"], settings["rescale"]} <= _OF_PACKAGE:
        return
    rule = rule_of(settings)
    shapes = [(4, 6), (6, 4)]
    x = [torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes]
    chosen = settings["momentum_dtype"]
    kept_in = dtype if chosen == "parameter" else getattr(torch, chosen)
    for stage in rule.stages:
        kept = tuple(
            [_zeros(buffer, shape, kept_in) for shape in shapes] for buffer in stage.buffers
        )
        norms = [one.double().norm() for one in x]
        given = Given(settings, settings["momentum"], shapes, norms)
        _check_result(stage.run, x, stage.run(x, kept, given))
    if not rule.whole.of_pairs:
        run = rule.whole.run
        _check_result(run, x, [run(one, polar, settings) for one in x])


def _zeros(buffer: Buffer, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if buffer.kind == "rows":
        return torch.zeros(shape[0], 1, dtype=buffer.dtype or torch.float32, device="cpu")
    return torch.zeros(shape, dtype=buffer.dtype or dtype, device="cpu")


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
