"""Scale the outputs of weights, wherever a launcher keeps the weights.

In: a parameter and one multiplier for each of its outputs. Out: the parameter, changed in place:
each rank scales what it holds. DeepSpeed also has a copy in float32 and, in stage 3, parts on each
rank; both are scaled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_muon.integrations.attentions import Attention
from hf_muon.routing.matrices import columns_are_outputs


@torch.no_grad()
def scale_attention(attention: Attention, gamma: Tensor) -> None:
    """Multiply the logits of an attention module by γ; all ranks must call it.

    Args:
        attention: The module.
        gamma: γ of each head, (heads,). Where it is 1, weights stay the same bit for bit, except
            those of heads that share a key with other heads.
    """
    for name, factors in attention.factors(gamma).items():
        projection = attention.projections[name]
        dim = int(columns_are_outputs(projection))
        scale_outputs(projection.weight, factors, dim)
        if isinstance(projection.bias, nn.Parameter):
            scale_outputs(projection.bias, factors, 0)


def scale_outputs(parameter: Any, factors: Tensor, dim: int) -> None:
    """Multiply a parameter by one number per index of a dimension."""
    shape = [1] * len(getattr(parameter, "ds_shape", parameter.shape))
    shape[dim] = -1
    factors = factors.view(shape)
    if is_partitioned(parameter):
        _scale_under_deepspeed(parameter, factors)
    elif hasattr(parameter, "placements"):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh
        copies = [Replicate()] * mesh.ndim
        factors = factors.to(parameter.to_local().device)
        parameter.mul_(DTensor.from_local(factors, mesh, copies, run_check=False))
    else:
        parameter.mul_(factors.to(parameter.device))


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed keeps a float32 copy of the parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _scale_under_deepspeed(parameter: Any, factors: Tensor) -> None:
    """Scale the copy that the optimizer trains, and the weight that the model computes with.

    Setting the copy does not change the weight (DeepSpeed 0.19).
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    whole = whole.view(getattr(parameter, "ds_shape", parameter.shape)) * factors.to(whole)
    safe_set_full_fp32_param(parameter, whole)
    with GatheredParameters([parameter], modifier_rank=0):  # has an effect only in stage 3
        parameter.data.copy_(whole)
