"""Which implementation multiplies on a device: chosen by name, checked at first use, logged once.

In: a name, a device and a dtype. Out: :class:`Products`. Implementations other than torch's
library are compared with float64 on that device and in that dtype before they are used.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_muon.polar.precision import check_name

from .halves import HALVES
from .products import TORCH, Products

logger = logging.getLogger(__name__)

KERNELS = ("auto", "torch", "triton", "quack")
_HALF = (torch.bfloat16, torch.float16)
# For each name: its dtypes, and the distribution to install.
_DTYPES = {"triton": (*_HALF, torch.float32), "quack": _HALF}
_DISTRIBUTIONS = {"triton": "triton", "quack": "quack-kernels"}
# The largest relative error of a product, in units of its dtype's epsilon. In half precision an
# entry is rounded once, by half a unit; Triton's interpreter truncates, by one unit. In float32 a
# sum of 1040 products is off by about 7 units; with TF32 it would be thousands.
_UNITS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 32}


def check_kernel(kernel: object) -> None:
    """Raise for an unknown name, and for one whose library is not installed.

    Raises:
        TypeError: it is not a string.
        ValueError: it is not one of ``KERNELS``.
        RuntimeError: its library is not installed.
    """
    check_name("kernel", kernel, KERNELS)
    missing = _missing(str(kernel))
    if missing:
        raise RuntimeError(_unusable(str(kernel), missing))


def products_for(
    kernel: str, device: torch.device, dtype: torch.dtype, *, by_halves: bool, is_fake: bool = False
) -> Products:
    """Return the products to use on a device in a dtype.

    Args:
        kernel: ``torch``; ``triton`` or ``quack``, in the dtypes they support; or ``auto``:
            ``triton`` in half precision on NVIDIA devices of compute capability 8.0 and newer, if
            it is installed and passes the check, else ``torch``.
        device: where the matrices are.
        dtype: the compute dtype.
        by_halves: whether a CPU may compute symmetric products by halves, as the other
            implementations always do.
        is_fake: whether the matrices have no memory: then nothing is checked or multiplied.

    Raises:
        RuntimeError: ``triton`` or ``quack`` cannot be used on this device, or gives wrong results.
    """
    own = HALVES if by_halves else TORCH
    if kernel == "torch" or (kernel == "auto" and (device.type != "cuda" or dtype not in _HALF)):
        return own
    name = "triton" if kernel == "auto" else kernel
    if dtype not in _DTYPES[name] or torch.compiler.is_compiling():
        return own
    if is_fake:
        return own if _missing(name) else _loaded(name)
    return _checked(kernel, name, device, dtype) or own


@cache
def _checked(kernel: str, name: str, device: torch.device, dtype: torch.dtype) -> Products | None:
    """Return the products of a name; None if ``auto`` must fall back to torch's library."""
    is_named = kernel == name
    problem = _missing(name) or _unfit(name, device)
    if problem is None:
        try:
            found = _loaded(name)
            problem = problem_of(found, device, dtype)
        except Exception as error:  # anything that a compiler or a driver may raise
            problem = f"{type(error).__name__}: {error}"
        if problem is not None and not is_named:
            warnings.warn(
                f"Polar factors on {device} in {str(dtype)[6:]} are computed by torch's library: "
                f"{name} does not pass the check at first use ({problem}). Set "
                "polar_kernel='torch' to silence this.",
                stacklevel=2,
            )
    if problem is not None and is_named:
        raise RuntimeError(_unusable(name, problem))
    chosen, reason = (name, "") if problem is None else ("torch", f" ({problem})")
    logger.info("polar factors on %s in %s by %s%s", device, str(dtype)[6:], chosen, reason)
    return found if problem is None else None


def _unusable(name: str, problem: str) -> str:
    return (
        f"polar_kernel (kernel of polar_factor) is {name!r}, which cannot be used: {problem}. Use "
        "'auto', which takes what there is, or 'torch'."
    )


def _missing(name: str) -> str | None:
    if name not in _DTYPES or find_spec(name) is not None:
        return None
    return f"{_DISTRIBUTIONS[name]} is not installed"


def _loaded(name: str) -> Products:
    module = importlib.import_module(f"{__package__}.{name}_products")
    found: Products = getattr(module, name.upper())
    return found


def _unfit(name: str, device: torch.device) -> str | None:
    """Say why a device does not support it; None if it does."""
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return None
        return f"{device} has compute capability {major}.{minor}, and 8.0 or newer is needed"
    interpreted = name == "triton" and device.type == "cpu" and _is_interpreted()
    return None if interpreted else f"the matrices are on {device}, and it needs an NVIDIA device"


def _is_interpreted() -> bool:
    return bool(importlib.import_module(f"{__package__}.triton_products").INTERPRETED)


def problem_of(products: Products, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what is wrong with products on a device, in numbers; None if nothing is.

    The check uses odd sizes, both small and large enough for large blocks. It compares each product
    with float64, and requires exact symmetry and the same bits for a matrix alone and in a batch.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # leaves torch's global generators alone
    sizes = [(33, 70)] if device.type == "cpu" else [(33, 70), (256, 160), (640, 1040)]
    for s, l in sizes:  # noqa: E741
        X = torch.randn(3, s, l, generator=generator, device="cpu")
        X = X.div_(l**0.5).to(device, dtype)
        A, P, Y = _three(products, X)
        expected = {
            "XXᵀ": (A, X.double() @ X.double().mT),
            "bA + cA²": (P, -2.0 * A.double() + 1.5 * (A.double() @ A.double())),
            "aX + BX": (Y, 3.0 * X.double() + P.double() @ X.double()),
        }
        bound = _UNITS[dtype] * torch.finfo(dtype).eps
        for formula, (found, exact) in expected.items():
            error = float((found.double() - exact).norm() / exact.norm())
            if not error <= bound:  # also true for NaN
                return f"{formula} of {s} × {l} is off by {error:.2g}, {bound:.2g} is allowed"
        problem = _is_not_fixed(products, X, (A, P, Y)) if products.is_fixed else None
        if problem:
            return problem
    return None


def _three(products: Products, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return one product of each kind, of the sizes that an iteration has."""
    A = X.new_empty(*X.shape[:-1], X.shape[-2])
    P, Y = torch.empty_like(A), torch.empty_like(X)
    products.gram(X, out=A)
    products.polynomial(A, -2.0, 1.5, out=P)
    products.general(P, X, X, beta=3.0, out=Y)
    return A, P, Y


def _is_not_fixed(products: Products, X: Tensor, batch: tuple[Tensor, ...]) -> str | None:
    """Say how the products of a batch differ, in bits, from those of one of its matrices alone."""
    size = f"{X.shape[1]} × {X.shape[2]}"
    if not all(torch.equal(of, of.mT) for of in batch[:2]):
        return f"symmetric products of {size} are not exactly symmetric"
    of_batch = (*(of[1] for of in batch), products.norm(X)[1].view(()))
    one = X[1].clone()
    alone = (*_three(products, one), products.norm(one).view(()))
    if all(map(torch.equal, alone, of_batch)):
        return None
    return f"a matrix of {size} has other bits alone than in a batch"
