"""Whether state fits its tensors, and what torch's loader would get wrong.

In: the state of parameters, as saved, loaded, or edited by others. Out: the same state in the
dtype, layout and place that a step needs, or an error that names the parameter and the problem.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_muon.distributed.find import is_dtensor, local
from hf_muon.optimizer.entries import Entry, Group
from hf_muon.rules import kept_by
from hf_muon.stages import Buffer

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STEPS = 2**53
_REMEDY = "Load the checkpoint of this model, or start the optimizer afresh."


_OF_ADAMW = (Buffer("exp_avg"), Buffer("exp_avg_sq", squares=True))


def buffer_dtype(group: Group, parameter: Tensor, buffer: Buffer) -> torch.dtype:
    """Return the dtype of a stage's buffer for a parameter."""
    if buffer.dtype is not None:
        return buffer.dtype
    if buffer.kind != "entries":
        return torch.float32
    name = group.get("momentum_dtype", "parameter")
    dtype: torch.dtype = parameter.dtype if name == "parameter" else getattr(torch, name)
    return dtype


def buffers_of(group: Group) -> tuple[Buffer, ...]:
    """Return the buffers of each parameter of a group."""
    return _OF_ADAMW if group["algorithm"] == "adamw" else kept_by(group)


def new_state(entry: Entry) -> dict[str, Tensor]:
    """Return the step count and the buffers, which begin as zeros."""
    group, parameter = entry.group, entry.tensor
    state = {"step": step_count(0)}
    for buffer in buffers_of(group):
        dtype = buffer_dtype(group, parameter, buffer)
        if buffer.kind == "entries":
            state[buffer.name] = torch.zeros_like(parameter, dtype=dtype)
        else:  # a plain tensor even if the parameter is a DTensor: every rank has all of it
            shape, device = shape_of(entry, buffer), local(parameter).device
            state[buffer.name] = torch.zeros(shape, dtype=dtype, device=device)
    return state


def shape_of(entry: Entry, buffer: Buffer) -> tuple[int, ...]:
    """Return the shape of a buffer."""
    if buffer.kind == "entries":
        return tuple(entry.tensor.shape)
    return buffer.shape([(matrix.rows, matrix.cols) for matrix in entry.matrices])


def check_values(name: str, group: Group, parameter: Tensor, state: Any) -> None:
    """Raise for the state of a parameter that cannot be trained with; any real dtype will do.

    Raises:
        ValueError: Something is missing, has another shape, is not a real tensor, or is not finite.
    """
    name = name[:90]
    if not isinstance(state, Mapping):
        raise ValueError(f"The state of {name} is a {type(state).__name__}, not a dict. {_REMEDY}")
    buffers = buffers_of(group)
    for key in ("step", *(buffer.name for buffer in buffers)):
        if key not in state:
            raise ValueError(f"The state of {name} has no {key!r}. {_REMEDY}{_lost(key)}")
    if not 0 <= _number(state["step"]) < _STEPS:
        raise ValueError(
            f"'step' in the state of {name} is {str(state['step'])[:90]}; a number ≥ 0 is "
            f"expected. {_REMEDY}"
        )
    for buffer in buffers:
        what = f"{buffer.name!r} in the state of {name}"
        dtype = buffer_dtype(group, parameter, buffer)
        _check_buffer(what, buffer, state[buffer.name], parameter, dtype)


def _lost(key: str) -> str:
    if key in ("step", *(buffer.name for buffer in _OF_ADAMW)):
        return ""
    names = " and ".join(buffer.name for buffer in _OF_ADAMW)
    return (
        " The checkpoint was made with other settings of the update rule, or is universal: "
        f"DeepSpeed's universal checkpoints hold {names} only, its ordinary ones all."
    )


def _number(value: Any) -> float:
    """Return a step count as a float; NaN if it is not a number."""
    if not isinstance(value, Tensor | numbers.Real):
        return math.nan
    try:
        return float(value)
    except (OverflowError, ValueError, RuntimeError):  # huge; several entries; complex; meta
        return math.nan


def _check_buffer(
    what: str, buffer: Buffer, value: Any, parameter: Tensor, dtype: torch.dtype
) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is a {type(value).__name__}; a tensor is expected. {_REMEDY}")
    if value.dtype not in (*_FLOATS, torch.int8) or value.layout is not torch.strided:
        raise ValueError(
            f"{what} is a {value.layout} tensor of {value.dtype}; a dense one of real "
            f"floating-point numbers is expected. {_REMEDY}"
        )
    if (value.dtype == torch.int8) != (dtype == torch.int8):
        raise ValueError(
            f"{what} is a tensor of {value.dtype} and {dtype} is expected: momentum_dtype='int8' "
            "keeps other state than the other dtypes. Use the momentum_dtype of the checkpoint."
        )
    if value.shape != parameter.shape and buffer.kind == "entries":
        raise ValueError(
            f"{what} has shape {str(tuple(value.shape))[:90]} and the parameter "
            f"{tuple(parameter.shape)}. {_REMEDY}"
        )
    part = local(value).detach()
    if part.is_meta != local(parameter).is_meta:
        raise ValueError(f"{what} is on the meta device and holds no values. {_REMEDY}")
    if part.numel() and not part.is_meta:
        low, high = torch.stack(torch.aminmax(part)).tolist()
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"{what} holds NaN or infinity. {_REMEDY}")
        limits = torch.iinfo(dtype) if dtype == torch.int8 else torch.finfo(dtype)
        if max(-low, high) > limits.max:
            raise ValueError(f"{what} holds more than its dtype here, {limits.max:g}. {_REMEDY}")
        if buffer.squares and low < 0:
            raise ValueError(f"{what} holds {low:g}; an average of squares is ≥ 0. {_REMEDY}")


def step_count(value: Any) -> Tensor:
    """Return the count as its own tensor on the CPU; torch before 1.12 saved a Python number."""
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def check_fit(group: Group, known: Sequence[tuple[Entry, Mapping[str, Any]]]) -> None:
    """Raise for tensors of a group whose state no longer fits; cheap enough for every step.

    Raises:
        ValueError: A buffer is missing, or has another shape or dtype than it was created with.
    """
    buffers = buffers_of(group)
    names = {"step", *(buffer.name for buffer in buffers)}
    for entry, state in known:
        if not state.keys() >= names:
            raise ValueError(f"The state of {entry.name} holds only {sorted(state)}. {_REMEDY}")
    one_of = {entry.tensor.dtype: entry.tensor for entry, _ in known}
    for buffer in buffers:
        dtypes = {dtype: buffer_dtype(group, one, buffer) for dtype, one in one_of.items()}
        of_entries = buffer.kind == "entries"
        for entry, state in known:
            value, expected = state[buffer.name], dtypes[entry.tensor.dtype]
            shape = entry.tensor.shape if of_entries else shape_of(entry, buffer)
            if value.shape != shape:
                raise ValueError(
                    f"{buffer.name!r} in the state of {entry.name} has shape "
                    f"{tuple(value.shape)} and {tuple(shape)} is expected: was the model resized "
                    "after the optimizer was built? Build the optimizer afresh."
                )
            if value.dtype != expected and entry.flat is None:
                raise ValueError(
                    f"{buffer.name!r} in the state of {entry.name} has dtype {value.dtype} and "
                    f"{expected} is expected: was the model converted after the optimizer's first "
                    "step? Convert the state too: "
                    "optimizer.load_state_dict(optimizer.state_dict())."
                )


def check_state(group: Group, known: Sequence[tuple[Entry, MutableMapping[str, Any]]]) -> None:
    """Raise for unusable state; reads all of it, so call it only in the step after a load.

    Turns step counts that are numbers into tensors.

    Raises:
        ValueError: As :func:`check_values` and :func:`check_fit`.
    """
    for entry, state in known:
        check_values(entry.name, group, entry.tensor, state)
    check_fit(group, known)
    for _, state in known:
        if not isinstance(state["step"], Tensor):
            state["step"] = step_count(state["step"])


def restore(
    own: Sequence[Group], state: MutableMapping[Any, Any], loaded: Mapping[str, Any]
) -> None:
    """Give loaded buffers the dtype and layout of new ones, and step counts memory of their own.

    torch's loader (2.13, ``Optimizer._process_value_according_to_param_policy``) casts momentum to
    the parameter's dtype, and keeps the checkpoint's strides and step-count tensors.

    Args:
        own: The optimizer's groups, after loading.
        state: Its state, after loading; written.
        loaded: The state dict that was loaded.
    """
    for group, theirs in zip(own, loaded["param_groups"], strict=True):
        for parameter, index in zip(group["params"], theirs["params"], strict=True):
            if index not in loaded["state"]:
                continue
            entry, source = state[parameter], loaded["state"][index]
            for buffer in buffers_of(group):
                key, dtype = buffer.name, buffer_dtype(group, parameter, buffer)
                if buffer.kind != "entries":
                    entry[key] = local(source[key]).to(local(parameter).device, dtype, copy=True)
                else:
                    entry[key] = _laid_out(parameter, entry[key], source[key], dtype)


def _laid_out(parameter: Tensor, cast: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    if is_dtensor(cast) != is_dtensor(parameter):
        return cast  # the step refuses it with a message that says what to do
    strides = torch.empty_like(local(parameter), device="meta").stride()
    if cast.dtype == dtype and local(cast).stride() == strides:
        return cast
    return torch.empty_like(parameter, dtype=dtype).copy_(source)
