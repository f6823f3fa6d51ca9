"""Who multiplies on a device: asked for by name, checked at first use, said once in the log.

In: a name, a device and a dtype. Out: :class:`Products`. Before products other than those of
torch's library are used, they are compared with float64 on that device, in that dtype.
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
# By name: what is imported for it, the dtypes that it is for, and the distribution that has it.
_MODULES = {"triton": "triton_products", "quack": "quack_products"}
_DTYPES = {"triton": (*_HALF, torch.float32), "quack": _HALF}
_DISTRIBUTIONS = {"triton": "triton", "quack": "quack-kernels"}
# The largest relative error of a product, in units of its dtype. In half precision an entry is
# rounded once, by half a unit, and in Triton's interpreter, which cuts off, by one. In float32 a
# sum of 1040 products is off by some 7; TF32 would make thousands of it.
_UNITS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 32}


def check_kernel(kernel: object) -> None:
    """Refuse a name that does not exist, and one whose library is not installed.

    Raises:
        TypeError: it is no string.
        ValueError: it is not one of ``KERNELS``.
        RuntimeError: it names a library that is not installed.
    """
    check_name("kernel", kernel, KERNELS)
    missing = _missing(str(kernel))
    if missing:
        raise RuntimeError(_unusable(str(kernel), missing))


def products_for(
    kernel: str, device: torch.device, dtype: torch.dtype, *, by_halves: bool, is_fake: bool = False
) -> Products:
    """Return the products of a device in a dtype.

    Args:
        kernel: ``torch``; ``triton`` or ``quack``, in the dtypes that they are for; or ``auto``:
            ``triton`` in half precision on NVIDIA devices of compute capability 8.0 and newer,
            where it is installed and passes the check, else ``torch``.
        device: where the matrices are.
        dtype: the dtype to compute in.
        by_halves: whether a CPU may compute symmetric products by halves, as all others do.
        is_fake: whether the matrices only stand for others: nothing can be checked with them, and
            nothing is multiplied.

    Raises:
        RuntimeError: ``triton`` or ``quack`` cannot be used there, or multiplies wrongly.
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
    """The products of a name; None for those of the library, in place of what ``auto`` found."""
    is_named = kernel == name
    problem = _missing(name) or _unfit(name, device)
    if problem is None:
        try:
            found = _loaded(name)
            problem = problem_of(found, device, dtype)
        except Exception as error:  # whatever a compiler or a driver raises
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
    if name not in _MODULES or find_spec(name) is not None:
        return None
    return f"{_DISTRIBUTIONS[name]} is not installed"


def _loaded(name: str) -> Products:
    module = importlib.import_module(f"{__package__}.{_MODULES[name]}")
    found: Products = getattr(module, name.upper())
    return found


def _unfit(name: str, device: torch.device) -> str | None:
    """What speaks against a device, if anything does."""
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
    """Say what is wrong with products on a device, in figures; None if nothing is.

    Odd sizes, for small blocks and on devices for large ones, too: each product against float64,
    exact symmetry, and the same bits for a matrix alone as among others.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # nobody else's random numbers change
    sizes = [(33, 70)] if device.type == "cpu" else [(33, 70), (256, 160), (640, 1040)]
    for s, l in sizes:  # noqa: E741
        X = torch.randn(3, s, l, generator=generator, device="cpu")
        X = X.div_(l**0.5).to(device, dtype)
        A, P, Y = X.new_empty(3, s, s), X.new_empty(3, s, s), torch.empty_like(X)
        products.gram(X, out=A)
        products.polynomial(A, -2.0, 1.5, out=P)
        products.general(P, X, X, beta=3.0, out=Y)
        expected = {
            "XXᵀ": (A, X.double() @ X.double().mT),
            "bA + cA²": (P, -2.0 * A.double() + 1.5 * (A.double() @ A.double())),
            "aX + BX": (Y, 3.0 * X.double() + P.double() @ X.double()),
        }
        bound = _UNITS[dtype] * torch.finfo(dtype).eps
        for formula, (found, exact) in expected.items():
            error = float((found.double() - exact).norm() / exact.norm())
            if not error <= bound:  # NaN too
                return f"{formula} of {s} × {l} is off by {error:.2g}, {bound:.2g} is allowed"
        problem = _is_not_fixed(products, X, (A, P, Y)) if products.is_fixed else None
        if problem:
            return problem
    return None


def _is_not_fixed(products: Products, X: Tensor, batch: tuple[Tensor, ...]) -> str | None:
    """What is wrong with the bits of products of a batch, beside those of one of its matrices."""
    size = f"{X.shape[1]} × {X.shape[2]}"
    if not all(torch.equal(of, of.mT) for of in batch[:2]):
        return f"symmetric products of {size} are not exactly symmetric"
    of_batch = (*(of[1] for of in batch), products.norm(X)[1].view(()))
    one = X[1].clone()
    A, P, Y = (torch.empty_like(of[1]) for of in batch)
    products.gram(one, out=A)
    products.polynomial(A, -2.0, 1.5, out=P)
    products.general(P, one, one, beta=3.0, out=Y)
    alone = (A, P, Y, products.norm(one).view(()))
    if all(map(torch.equal, alone, of_batch)):
        return None
    return f"a matrix of {size} has other bits alone than in a batch"
