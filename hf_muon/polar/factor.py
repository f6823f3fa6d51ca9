"""From any matrix to its polar factor: validation, choice of method, scaling, orientation.

In: real matrices (…, m, n) of any floating dtype, device, strides and norm.
Out: O(X) = UVᵀ for X = UΣVᵀ, same shape; zero for zero.
``polar_factor`` keeps the dtype of its input, ``orthogonalize`` returns the compute dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import devices
from .coefficients import FAMILIES, Family, check_steps
from .coefficients import coefficients as coefficient_table
from .exact import svd_polar
from .gram import HALF_PRECISION, gram_newton_schulz, run_lengths
from .kernels import TORCH, Products, check_kernel, products_for
from .newton_schulz import newton_schulz
from .outliers import Watch, zero_outliers_
from .precision import check_name, compute_dtype, in_own_dtype, svd_dtype
from .scale import STARTS, prescale
from .together import aligned
from .workspace import Workspace

METHODS = ("auto", "newton_schulz", "gram", "svd")

Iteration = Callable[..., Tensor]
Empty = Callable[[str, Sequence[int]], Tensor]
ITERATIONS: dict[str, Iteration] = {"newton_schulz": newton_schulz, "gram": gram_newton_schulz}
SQUARES = {"newton_schulz": 2, "gram": 4}
"""How many temporaries (…, s, s) each needs."""
CPU_FLOAT32_SIDE = 16
"""Up to this shorter side ``gram`` takes a CPU longer in bfloat16 than in float32, whose products
of small squares have less to prepare (scripts/bench/step.py --batching)."""


def polar_factor(
    x: Tensor,
    *,
    method: str = "auto",
    coefficients: str = "tight",
    steps: int = 5,
    dtype: str | torch.dtype | None = None,
    kernel: str = "auto",
) -> Tensor:  # (…, m, n) -> (…, m, n)
    """Return the polar factor of each matrix, in the dtype of ``x``.

    O(X) = UVᵀ for X = UΣVᵀ: the singular vectors of X with every nonzero singular value set to one.
    The iterations approximate it; ``svd`` is exact to rounding.

    Args:
        x: matrices (…, m, n), float16, bfloat16, float32 or float64; not modified. Entries must be
            finite.
        method: ``newton_schulz`` (the polynomial on X), ``gram`` (the same polynomial on XXᵀ; in
            half precision with a larger safety ratio, see ``coefficients.py``), ``svd``, or
            ``auto``: the iteration with fewer operations for this shape, ``cheapest_iteration``.
        coefficients: ``polar_express``, ``tight`` (the same with a tighter scaling, so that four
            steps are as accurate as five of ``quintic``, unless the stable rank is near one),
            ``quintic``, or a name from ``register_coefficients``; ``svd`` ignores it.
        steps: iterations, 1 to 99 for ``quintic``, 3 to 8 for the others; ``svd`` ignores it.
        dtype: compute dtype: ``bfloat16``, ``float16`` (not on a CPU), ``float32``, ``float64``.
            None or ``auto`` takes bfloat16 where the device has it natively, else float16 on GPUs
            with tensor cores for it (compute capability 7.x), else float32. A CPU also takes
            float32 for ``gram`` if the shorter side is at most 16. ``svd`` computes in float32, or
            in float64 for float64 input or on request.
        kernel: what computes the matrix products. ``torch``: its library; on a CPU symmetric
            products by halves. ``triton`` (bfloat16, float16, float32; ``torch`` for other dtypes):
            kernels whose bits do not depend on the batch. ``quack`` (bfloat16, float16): the
            symmetric products of quack-kernels. ``auto``: ``triton`` in bfloat16 and float16 on
            NVIDIA devices of compute capability 8.0 and newer, if it is installed and passes a
            check against float64 at first use, else ``torch``.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: ``x`` is not a strided tensor of real floating-point numbers, or an argument has
            the wrong type.
        ValueError: ``x`` has fewer than two dimensions, or an argument has a value not allowed.
        RuntimeError: ``kernel`` is not installed or cannot be used on this device.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, -2.0]])
        >>> polar_factor(x, method="svd")
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    factor = orthogonalize(
        x, method=method, coefficients=coefficients, steps=steps, dtype=dtype, kernel=kernel
    )
    return factor.to(x.dtype)


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    method: str,
    coefficients: str,
    steps: int,
    dtype: str | torch.dtype | None,
    kernel: str = "auto",
    compile: bool = False,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    outliers: Watch | None = None,
) -> Tensor:  # (…, m, n) -> (…, m, n)
    """Return the polar factor of each matrix, in the compute dtype; no gradient is recorded.

    Arguments, result and errors are those of ``polar_factor``, except for the dtype of the result.
    Tall matrices are iterated as their contiguous transposes, so O(Xᵀ) = O(X)ᵀ exactly when X is
    not square. More than one matrix goes through batched kernels. In float32 on a CPU the
    iterations then give each matrix the bits it gets alone if its shorter side is at least 16; for
    smaller matrices, for ``svd`` and on other devices they agree to rounding.

    Args:
        x: matrices (…, m, n); not modified.
        method: see ``polar_factor``.
        coefficients: see ``polar_factor``.
        steps: see ``polar_factor``.
        dtype: see ``polar_factor``.
        kernel: see ``polar_factor``; ``compile`` always uses torch's library.
        compile: run the iteration through ``torch.compile``, compiled once per shape. Matrix
            products stay library calls; the operations between them are fused and not rounded to
            the compute dtype in between, so results differ by such roundings. No gain on CPUs.
        out: where to write the result, in the dtype of ``out``: contiguous, of the shape of x, or
            x itself. Default: a new tensor in the compute dtype.
        workspace: memory for temporaries that later calls reuse. Default: none is kept.
        outliers: receives flags (k,) for the matrices whose polar factor overflowed in half
            precision; their result is zero. Nothing overflows in float32 or on CPUs. Default: no
            check.

    Returns:
        Shape of ``x``; ``out`` if it is given.
    """
    _check_matrices(x)
    _check_choices(method, coefficients, steps)
    check_kernel(kernel)
    name, target = _chosen(x, method, steps, dtype)
    result = x.new_empty(x.shape, dtype=target) if out is None else out
    if x.numel() == 0:
        return result

    flat = _flat_shape(x.shape)
    with in_own_dtype(x.device.type):
        if name == "svd":
            _svd(x.reshape(flat), result.view(flat), target)
            return result
        half_gram = name == "gram" and target in HALF_PRECISION
        family = FAMILIES[coefficients]
        triples = coefficient_table(coefficients, steps, half_gram=half_gram)
        run = partial(
            _iteration(name, compile),
            triples=triples,
            start=STARTS[family.start],
            products=TORCH if compile else _products(x, kernel, target, name, family),
        )
        empty = partial((workspace or Workspace()).empty, dtype=target, device=x.device)
        into = result.view(flat)
        squares = 0 if compile else SQUARES[name]
        _iterate(into if out is x else x.reshape(flat), into, run, squares, empty)
        if outliers is not None and target in HALF_PRECISION and not devices.is_cpu(x.device):
            outliers.flags.append(zero_outliers_(into, triples, outliers.side))
    return result


def _chosen(
    x: Tensor, method: str, steps: int, dtype: str | torch.dtype | None
) -> tuple[str, torch.dtype]:
    """Return the method and the compute dtype, with ``auto`` resolved."""
    if method == "svd":
        return method, svd_dtype(dtype, x.dtype)
    target = compute_dtype(dtype, x.device)
    name = cheapest_iteration(x.shape, steps, target) if method == "auto" else method
    is_small = devices.is_cpu(x.device) and min(x.shape[-2:]) <= CPU_FLOAT32_SIDE
    if is_small and name == "gram" and dtype in (None, "auto"):
        target = torch.float32
    return name, target


def _products(x: Tensor, kernel: str, dtype: torch.dtype, method: str, family: Family) -> Products:
    by_halves = method == "gram" or family.mirrors
    fake = devices.is_fake(x)
    return products_for(kernel, x.device, dtype, by_halves=by_halves, is_fake=fake)


def _svd(x: Tensor, out: Tensor, dtype: torch.dtype) -> None:  # (…, m, n), (…, m, n)
    is_tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if is_tall else x
    factor = svd_polar(prescale(wide, out=wide.new_empty(wide.shape, dtype=dtype)))
    out.copy_(factor.mT if is_tall else factor)


def _iterate(x: Tensor, out: Tensor, run: Iteration, squares: int, empty: Empty) -> None:
    """Copy x, scaled and wide, into memory that the result needs anyway; iterate; copy it back."""
    is_tall = out.shape[-2] > out.shape[-1]
    *batch, s, l = out.mT.shape if is_tall else out.shape  # noqa: E741
    sides = aligned(s, x.device), aligned(l, x.device)
    if sides != (s, l):
        _iterate_padded(
            x.mT if is_tall else x, out.mT if is_tall else out, sides, run, squares, empty
        )
        return
    square = empty("squares", (squares, *batch, s, s))
    here = out if out.dtype == square.dtype else empty("here", out.shape)
    other = empty("other", (*batch, s, l))
    # Transposed views would select other kernels, and each pass over them takes far longer.
    X, spare = (other, here.view_as(other)) if is_tall else (here, other)
    prescale(x.mT if is_tall else x, out=X)
    found = run(X, spare, square)
    if found is not X:
        X.copy_(found)
    if is_tall:
        here.copy_(X.mT)
    if here is not out:
        out.copy_(here)


def _iterate_padded(
    x: Tensor, out: Tensor, sides: tuple[int, int], run: Iteration, squares: int, empty: Empty
) -> None:
    """The same for wide matrices (…, s, l), padded with zeros to the given sides."""
    *batch, s, l = x.shape  # noqa: E741
    X = empty("other", (*batch, *sides)).zero_()
    prescale(x, out=X[..., :s, :l])
    found = run(X, empty("here", X.shape), empty("squares", (squares, *batch, sides[0], sides[0])))
    out.copy_(found[..., :s, :l])


def cheapest_iteration(shape: Sequence[int], steps: int, dtype: torch.dtype) -> str:
    """Return ``gram`` or ``newton_schulz``, whichever needs fewer floating-point operations.

    With sides s <= l, k steps cost k(4s²l + 2s³) on X and 4s²l + (8k − 6)s³ per run on the Gram
    matrix; at five steps ``gram`` is cheaper from l = 1.5 s on. This does not count mirroring,
    which saves more in ``gram``.

    Args:
        shape: (…, m, n).
        steps: iterations.
        dtype: compute dtype, which determines the length of the runs.

    Returns:
        A key of ``ITERATIONS``.
    """
    s, l = sorted(shape[-2:])  # noqa: E741
    on_x = steps * (4 * l + 2 * s)
    on_gram = sum(4 * l + (8 * run - 6) * s for run in run_lengths(steps, dtype))
    return "gram" if on_gram < on_x else "newton_schulz"


def _flat_shape(shape: torch.Size) -> tuple[int, ...]:
    """Drop leading dimensions for one matrix; merge them into a batch (k, m, n) for several."""
    count = shape[:-2].numel()
    return tuple(shape[-2:]) if count == 1 else (count, *shape[-2:])


@cache
def _iteration(method: str, compile: bool) -> Iteration:
    iterate = ITERATIONS[method]
    if not compile:
        return iterate

    def with_own_temporaries(X: Tensor, *_: Tensor, **settings: Any) -> Tensor:
        # torch.compile would copy back what the function writes to its arguments.
        squares = X.new_empty(SQUARES[method], *X.shape[:-1], X.shape[-2])
        return iterate(X.clone(), torch.empty_like(X), squares, **settings)

    # Static shapes: one compilation per shape. A model has more shapes than torch's default limit
    # of 8, past which torch silently stops compiling. The argument is newer than torch 2.9.
    options: dict[str, Any] = {"dynamic": False}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = 256
    compiled: Iteration = torch.compile(with_own_temporaries, **options)
    return compiled


def _check_matrices(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; a torch.Tensor is needed.")
    if x.layout != torch.strided:
        raise TypeError(f"x has layout {x.layout}; a dense tensor is needed: use x.to_dense().")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; real floating-point numbers are needed.")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; at least two dimensions are needed.")


def _check_choices(method: str, coefficients: str, steps: int) -> None:
    check_name("method", method, METHODS)
    check_name("coefficients", coefficients, tuple(FAMILIES))
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps={steps!r} is a {type(steps).__name__}; an int is needed.")
    if method != "svd":
        check_steps(coefficients, steps)
