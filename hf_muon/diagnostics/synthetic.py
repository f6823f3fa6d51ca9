"""Gradients with a known signal: a low-rank matrix in noise, and an underdetermined regression.

In: shapes, strengths, a kind of noise, a seed. Out: ``spiked_stream`` yields one gradient at a time
with its signal, ``matrix_sensing`` returns a solved problem. Leading dimensions hold any number of
independent copies. The same arguments give the same numbers on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_muon.polar import polar_factor

NOISES = ("gaussian", "student_t", "arch")


class Observation(NamedTuple):
    """One step of a stream.

    Attributes:
        gradient: Signal plus noise, (…, m, n).
        signal: S = U diag(λ) Vᵀ at this step, (…, m, n).
        left: U, orthonormal, (…, m, r).
        right: V, orthonormal, (…, n, r).
    """

    gradient: Tensor
    signal: Tensor
    left: Tensor
    right: Tensor


def spiked_stream(
    m: int,
    n: int,
    strengths: Sequence[float],
    *,
    steps: int,
    noise: str = "gaussian",
    sigma: float = 1.0,
    degrees_of_freedom: float = 3.0,
    arch: float = 0.3,
    drift: float = 0.0,
    batch: Sequence[int] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Iterator[Observation]:
    """Yield gradients G_t = U_t diag(λ) V_tᵀ + Ξ_t with known U, λ, V.

    Noise entries are independent of each other and uncorrelated over time. With z standard normal:

    * ``gaussian``: ξ = σz.
    * ``student_t``: ξ = σt with t of ν degrees of freedom, divided by its standard deviation if
      that is finite (ν > 2); for ν ≤ 2 the variance is infinite and σ is the scale.
    * ``arch``: ξ_t = √h_t z_t with h_t = (1−α)σ² + αξ²_{t−1} and h_1 = σ²: variance σ² at every
      step, but with quiet and loud periods.

    With ``drift`` every singular vector turns by that angle per step, within a plane of its own.

    Args:
        m: Rows.
        n: Columns.
        strengths: Singular values λ of the signal, r of them; none for pure noise.
        steps: Length of the stream.
        noise: ``gaussian``, ``student_t`` or ``arch``.
        sigma: σ, the standard deviation of an entry, ≥ 0. The closed forms for a spike are stated
            for 1/√m.
        degrees_of_freedom: ν > 0 of ``student_t``.
        arch: α in [0, 1) of ``arch``; below 1/√3 the fourth moment is finite.
        drift: Angle per step in radians; 0 fixes the signal.
        batch: Leading dimensions: independent copies, each with directions of its own.
        seed: Of the generator.
        dtype: ``torch.float32`` or ``torch.float64``.
        device: Default: the CPU.

    Returns:
        An iterator over ``steps`` observations.

    Raises:
        ValueError: An argument is out of range, or min(m, n) is too small for r directions (2r with
            drift).

    References:
        Signal plus perturbation and ARCH noise: arXiv 2606.03899.

    Example:
        >>> stream = spiked_stream(64, 32, [4.0], steps=10, noise="arch", batch=(8,))
        >>> next(stream).gradient.shape
        torch.Size([8, 64, 32])
    """
    rank = len(strengths)
    room = 2 * rank if drift else rank
    _require(noise in NOISES, f"noise={noise!r}", f"one of {', '.join(NOISES)}")
    _require(min(m, n) >= max(1, room), f"{rank} strengths in {m} by {n}", f"min(m, n) ≥ {room}")
    _require(sigma >= 0, f"sigma={sigma!r}", "sigma ≥ 0")
    _require(degrees_of_freedom > 0, f"degrees_of_freedom={degrees_of_freedom!r}", "a number > 0")
    _require(0 <= arch < 1, f"arch={arch!r}", "0 ≤ arch < 1")
    _require(dtype.is_floating_point and dtype.itemsize >= 4, f"dtype={dtype}", "float32, float64")
    generator = torch.Generator(device=device or "cpu").manual_seed(seed)
    draw = _Draw(generator, tuple(batch), dtype)
    values = torch.tensor(list(strengths), dtype=dtype, device=generator.device)
    left, right = (draw.orthonormal(side, room) for side in (m, n))
    signals = _signals(left, right, values, drift)
    noises = {  # iterators, which draw nothing yet
        "gaussian": _gaussian(draw, (m, n)),
        "student_t": _student_t(draw, (m, n), degrees_of_freedom),
        "arch": _arch(draw, (m, n), arch),
    }[noise]
    return (
        Observation(S + sigma * xi, S, U, V)
        for _, (S, U, V), xi in zip(range(steps), signals, noises, strict=False)
    )


def _require(holds: bool, given: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{given} is not allowed: {allowed} is expected.")


@dataclass(frozen=True)
class _Draw:
    """Random tensors with the leading dimensions, dtype and device of a stream."""

    generator: torch.Generator
    batch: tuple[int, ...]
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(
            (*self.batch, *shape),
            generator=self.generator,
            dtype=self.dtype,
            device=self.generator.device,
        )

    def uniform(self, *shape: int) -> Tensor:
        """In (0, 1], in float64, because transformed tails depend on its small values."""
        drawn = torch.rand(
            (*self.batch, *shape),
            generator=self.generator,
            dtype=torch.float64,
            device=self.generator.device,
        )
        return 1 - drawn

    def orthonormal(self, size: int, count: int) -> Tensor:
        """Return the first columns of a random rotation, (…, size, count)."""
        Q, R = torch.linalg.qr(self.normal(size, count))
        # The signs of R's diagonal make Q unique, and therefore uniformly distributed.
        uniform: Tensor = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return uniform


def _signals(
    left: Tensor, right: Tensor, values: Tensor, drift: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (S, U, V) at each step; the second half of the bases are the directions to turn to."""
    rank, step = len(values), 0
    U, V = left[..., :rank], right[..., :rank]
    S = (U * values) @ V.mT
    while True:
        yield S, U, V
        if drift:
            step += 1
            cos, sin = math.cos(step * drift), math.sin(step * drift)
            U = cos * left[..., :rank] + sin * left[..., rank:]
            V = cos * right[..., :rank] + sin * right[..., rank:]
            S = (U * values) @ V.mT


def _gaussian(draw: _Draw, shape: tuple[int, int]) -> Iterator[Tensor]:
    while True:
        yield draw.normal(*shape)


def _student_t(draw: _Draw, shape: tuple[int, int], nu: float) -> Iterator[Tensor]:
    """Bailey's polar method, Math. Comp. 62 (1994): √(ν(u^{−2/ν} − 1)) cos 2πw is t_ν exactly."""
    deviation = math.sqrt(nu / (nu - 2)) if nu > 2 else 1.0
    while True:
        radius = (nu * torch.expm1(draw.uniform(*shape).log() * (-2 / nu))).sqrt()
        angle = 2 * math.pi * draw.uniform(*shape)
        yield (radius * angle.cos() / deviation).to(draw.dtype)


def _arch(draw: _Draw, shape: tuple[int, int], alpha: float) -> Iterator[Tensor]:
    xi = draw.normal(*shape)  # h = 1
    while True:
        yield xi
        h = (1 - alpha) + alpha * xi.square()
        xi = h.sqrt() * draw.normal(*shape)


class Descent(NamedTuple):
    """The result of a descent.

    Attributes:
        weight: W after the last step, (…, m, n).
        losses: Before each step and after the last, (steps + 1, …).
    """

    weight: Tensor
    losses: Tensor


class MatrixSensing(NamedTuple):
    """An underdetermined regression, and two descents on it from zero, with steps of equal norm.

    Attributes:
        operators: A_i with standard normal entries, (…, p, m, n).
        targets: y_i = ⟨A_i, W*⟩_F, (…, p).
        truth: W* of the requested rank, ‖W*‖_F = 1, (…, m, n).
        polar: W ← W − η_t O(∇L).
        gradient: The control W ← W − η_t ‖O(∇L)‖_F ∇L/‖∇L‖_F.
    """

    operators: Tensor
    targets: Tensor
    truth: Tensor
    polar: Descent
    gradient: Descent


def matrix_sensing(
    m: int,
    n: int,
    measurements: int,
    *,
    rank: int = 1,
    steps: int = 500,
    lr: float = 0.02,
    batch: Sequence[int] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> MatrixSensing:
    """Fit W to p < mn linear measurements by polar steps, and by gradient steps of equal norm.

    L(W) = Σ_i(⟨A_i, W⟩ − y_i)²/(2p). Many W reach zero loss; the one that is found shows the bias
    of the method. Polar steps reach a flatter spectrum (larger ``effective_rank``) than the
    control, so the flatness does not come from the normalization. The learning rate falls linearly
    to zero, because steps of fixed size would not converge.

    Args:
        m: Rows of W.
        n: Columns of W.
        measurements: p, 1 ≤ p < mn.
        rank: Rank of the truth W*.
        steps: Steps of each descent.
        lr: η at the first step: the spectral norm of the first polar step.
        batch: Leading dimensions: independent problems.
        seed: Of the generator.
        dtype: ``torch.float32`` or ``torch.float64``.
        device: Default: the CPU.

    Returns:
        The problem and both solutions.

    Raises:
        ValueError: An argument is out of range.

    References:
        arXiv 2606.08388, the matrix-sensing experiments.
    """
    _require(1 <= measurements < m * n, f"measurements={measurements!r}", f"1 … {m * n - 1}")
    _require(1 <= rank <= min(m, n), f"rank={rank!r}", f"1 … {min(m, n)}")
    _require(steps >= 1 and lr > 0, f"steps={steps!r}, lr={lr!r}", "steps ≥ 1 and lr > 0")
    draw = _Draw(torch.Generator(device=device or "cpu").manual_seed(seed), tuple(batch), dtype)
    factors = draw.normal(m, rank) @ draw.normal(rank, n)
    truth = factors / torch.linalg.matrix_norm(factors, keepdim=True)
    operators = draw.normal(measurements, m, n)
    targets = (operators * truth.unsqueeze(-3)).sum((-2, -1))

    def norm_matched(gradient: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(gradient, keepdim=True)
        return gradient * (math.sqrt(min(m, n)) / norm.clamp(min=torch.finfo(dtype).tiny))

    def descend(direction: Callable[[Tensor], Tensor]) -> Descent:
        flat = operators.flatten(-2)  # (…, p, mn)
        weight, losses = torch.zeros_like(truth), []
        for step in range(steps + 1):
            residual = (flat @ weight.flatten(-2).unsqueeze(-1)).squeeze(-1) - targets  # (…, p)
            losses.append(residual.square().mean(-1) / 2)
            if step < steps:
                gradient = (residual.unsqueeze(-2) @ flat).reshape(weight.shape) / measurements
                weight = weight - lr * (1 - step / steps) * direction(gradient)
        return Descent(weight, torch.stack(losses))

    polar = descend(lambda gradient: polar_factor(gradient, method="svd"))
    return MatrixSensing(operators, targets, truth, polar, descend(norm_matched))
