"""PEFT adapters: which of their tensors are matrices of a linear map.

In: a model that may contain PEFT tuner layers. Out: a decision for every adapter tensor. Tensors
are found through the containers of the tuner layers, never through names. LoRA's A and B are
matrices and come with their partner and ``scaling``; everything else goes to AdamW. PEFT is
inspected only if it has been imported; otherwise there can be no PEFT model.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hf_muon.distributed.layout import Matrix
from hf_muon.routing.matrices import Matrices, expert_fan_out, stack, whole
from hf_muon.routing.survey import shape_of, unwrapped

Factor = Literal["A", "B"]
OF_RANK_ONE = "LoRA factor of rank 1, a vector"


@dataclass(frozen=True)
class Adapter:
    """The decision for one adapter tensor.

    Attributes:
        reason: In words.
        matrices: The matrices in it; empty unless it is LoRA's A or B.
        factor: ``A`` or ``B`` of W₀ + cBA.
        partner: The other one, if both are trained.
        scaling: c.
        beyond: Why the layer does not compute W₀ + cBA, so that A and B do not move as a product.
    """

    reason: str
    matrices: Matrices = ()
    factor: Factor | None = None
    partner: Tensor | None = None
    scaling: float | None = None
    beyond: str = ""


def adapters(model: nn.Module) -> dict[int, Adapter]:
    """Return decisions for a model's adapter tensors, by ``id`` (valid during one routing call)."""
    if "peft" not in sys.modules:
        return {}
    model = unwrapped(model)
    found = _beside_the_base_model(model)
    tuner_layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    saved_copy = importlib.import_module("peft.utils").ModulesToSaveWrapper
    for module in model.modules():
        if isinstance(module, saved_copy):
            for parameter in module.modules_to_save.parameters():
                found[id(parameter)] = Adapter("modules_to_save: a trained copy of a module")
        if isinstance(module, tuner_layer):
            found.update(_of_tuner_layer(module))
    return found


def _beside_the_base_model(model: nn.Module) -> dict[int, Adapter]:
    """Return decisions for what a PEFT model adds beside its base model: prompt encoders, …."""
    if not isinstance(model, importlib.import_module("peft").PeftModel):
        return {}
    base = model.get_base_model()
    inside = {id(parameter) for parameter in base.parameters()}
    reason = "adapter: prompt or shared tensor beside the base model"
    return {id(p): Adapter(reason) for p in model.parameters() if id(p) not in inside}


def _of_tuner_layer(layer: nn.Module) -> dict[int, Adapter]:
    """Return decisions for everything a tuner layer added to its base layer."""
    # The base layer follows the ordinary rules: a norm trained along with LoRA stays a norm.
    kind = type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
    found = {
        id(parameter): Adapter(f"adapter: {container} of {kind}, no factor of a linear map")
        for name, parameter in layer.named_parameters()
        if (container := name.split(".")[0]) not in ("base_layer", "original_module")
    }
    for a, b, scaling, beyond in _pairs(layer):
        cut_a, cut_b = _factor_matrices(layer, a, b)
        paired = cut_a and cut_b and a.requires_grad and b.requires_grad
        of_a, of_b = (b, a) if paired else (None, None)
        if cut_a:
            found[id(a)] = Adapter("adapter: LoRA factor A", cut_a, "A", of_a, scaling, beyond)
        if cut_b:
            found[id(b)] = Adapter("adapter: LoRA factor B", cut_b, "B", of_b, scaling, beyond)
        if not cut_a and not cut_b:
            found[id(a)] = found[id(b)] = Adapter(f"adapter: {OF_RANK_ONE}")
    return found


def _pairs(layer: Any) -> Iterator[tuple[Tensor, Tensor, float, str]]:
    """Yield A, B, the scaling, and what is beyond W₀ + cBA, for each linear adapter of a layer.

    AdaLoRA derives from LoRA, but its A and B are singular vectors that a penalty keeps orthogonal;
    they are not free matrices.
    """
    lora_layer = importlib.import_module("peft.tuners.lora").LoraLayer
    adalora_layer = importlib.import_module("peft.tuners.adalora.layer").AdaLoraLayer
    if not isinstance(layer, lora_layer) or isinstance(layer, adalora_layer):
        return
    for adapter in layer.lora_A:
        first, second = layer.lora_A[adapter], layer.lora_B[adapter]
        if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
            variant = getattr(layer, "lora_variant", {}).get(adapter)
            beyond = "DoRA normalizes W + cBA" if layer.use_dora.get(adapter) else ""
            if type(variant).__name__.startswith("Kasa"):
                beyond = "KaSA has a trained diagonal between B and A"
            yield first.weight, second.weight, float(layer.scaling[adapter]), beyond


def _factor_matrices(layer: Any, first: Tensor, second: Tensor) -> tuple[Matrices, Matrices]:
    """Return the matrices of A (r, in) and B (out, r); one per expert for a stack of experts.

    For a stack, PEFT's A (experts · r, in) holds the experts in consecutive rows; its B
    (out, r · experts) holds expert e in the columns e, e + experts, ….
    """
    shape_a, shape_b = shape_of(first), shape_of(second)
    wrapper = importlib.import_module("peft.tuners.lora.layer").ParamWrapper
    experts = int(getattr(layer, "num_experts", 1)) if isinstance(layer, wrapper) else 1
    if experts == 1:
        return _if_matrix(shape_a), _if_matrix(shape_b)
    rank, inputs, outputs = shape_a[0] // experts, shape_a[1], shape_b[0]
    # PEFT assumes (experts, out, in) for a stack that does not declare its layout. If it is really
    # (experts, in, out), A and B change sides; so their fan-out is left undeclared.
    fan_out_dim = None if expert_fan_out(layer.get_base_layer()) is None else 0
    strides = (rank * experts, experts)
    of_a = stack((experts, rank, inputs), fan_out_dim) if min(rank, inputs) > 1 else ()
    of_b = (Matrix(e, (outputs, rank), strides, fan_out_dim) for e in range(experts))
    return of_a, tuple(of_b) if min(rank, outputs) > 1 else ()


def _if_matrix(shape: tuple[int, ...]) -> Matrices:
    return whole(shape) if len(shape) == 2 and min(shape) > 1 else ()
