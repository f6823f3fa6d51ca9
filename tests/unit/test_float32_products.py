"""Products of float32 are computed in float32, whatever is set outside, wherever they are made."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_muon import Muon
from hf_muon.diagnostics import metrics
from hf_muon.diagnostics.activations import rank_of_rows
from hf_muon.diagnostics.advice import _overlap
from hf_muon.diagnostics.readings import Flipped
from hf_muon.integrations import attention_logits
from hf_muon.integrations.attention_logits import largest_logits
from tests.unit.optimizer.pairs import ITERATED, PRODUCT, TANGENT, factors, gradients_of

ONEDNN = torch.backends.mkldnn.matmul
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot")


class Products(TorchDispatchMode):
    """Notes the dtype of each product, and what float32 was computed in."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in PRODUCTS:
            self.seen.append((out.dtype, ONEDNN.fp32_precision))
        return out


@pytest.fixture
def _faster_products():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")
    ONEDNN.fp32_precision = "none"


def step(**settings):
    """One step of matrices that are computed alone and together."""
    shapes = [(20, 32), (20, 32), (32, 20), (24, 24)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    Muon(weights, lr=0.1, polar_dtype="float32", **settings).step()


def logits():
    attention = nn.Module()
    attention.is_causal = False
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    largest_logits(attention, query, key, None, "eager", {})


X, Y = torch.randn(12, 20), torch.randn(12, 20)
WEIGHTS, GRADIENT = factors()
PAIRS = WEIGHTS, gradients_of(WEIGHTS, GRADIENT)
WORK = {
    "newton_schulz": partial(step, polar_method="newton_schulz"),
    "gram": partial(step, polar_method="gram"),
    "svd": partial(step, polar_method="svd"),
    "polargrad": partial(step, matrix_map="polargrad"),
    "soft": partial(step, matrix_map="soft"),
    "product": partial(PRODUCT, *PAIRS, polar=ITERATED),
    "tangent": partial(TANGENT, *PAIRS, polar=ITERATED),
    "alignment": partial(metrics.signal_alignment, X, Y, 3),
    "angles": partial(metrics.principal_angles, X, Y, 3),
    "orthogonality": partial(metrics.orthogonality_error, X, Y),
    "rank of activations": partial(rank_of_rows, X),
    "overlap": partial(_overlap, X, Y, 2),
    "flips": Flipped(torch.randn(3, 4, 5), torch.ones(2, 3)).mean,
    "logits": logits,
}


@pytest.mark.usefixtures("_faster_products")
@pytest.mark.parametrize("name", WORK)
def test_no_product_is_rounded_to_fewer_digits(name, monkeypatch):
    monkeypatch.setattr(attention_logits, "visibility", lambda *_: lambda rows: torch.tensor(True))
    with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
        WORK[name]()
    assert products.seen
    for dtype, computed in products.seen:
        assert dtype == torch.float64 or (dtype, computed) == (torch.float32, "ieee")
    assert ONEDNN.fp32_precision == "bf16"
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("_faster_products")
def test_a_product_outside_is_seen_to_be_rounded():
    with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
        X @ Y.mT
    assert products.seen == [(torch.bfloat16, "bf16")]


@pytest.mark.usefixtures("_faster_products")
@pytest.mark.parametrize("update", [PRODUCT, TANGENT], ids=["product", "tangent"])
def test_an_error_inside_leaves_the_settings_as_they_were(update):
    def fails(_):
        raise ZeroDivisionError

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            update(*PAIRS, polar=fails)
        assert torch.is_autocast_enabled("cpu")
    assert ONEDNN.fp32_precision == "bf16"
    assert torch.get_float32_matmul_precision() == "medium"
