"""Matrix sensing: what polar steps do to the spectrum of the weights (arXiv 2606.08388).

In: underdetermined regressions. Out: the spectrum of the solution under polar steps and under
gradient steps of the same norm; whether the dynamics of singular values predict when the spectrum
flattens; and whether, of all bounded updates, the flat one raises the entropy most in one step.

To first order a step W + D moves a singular value by d_i = u_iᵀDv_i. With p_i = σ_i²/Σσ², the
entropy H = −Σ p_i ln p_i changes by dH = −2 Cov_p(d/σ, ln p): the spectrum flattens iff small
singular values grow proportionally faster. That is a condition on the measurements, which determine
d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from charts import COLORS, MARKERS, MUTED, grid, label, save
from parts import Parts, Task
from torch import Tensor

from hf_muon import diagnostics, polar_factor
from hf_muon.diagnostics.metrics import energies
from hf_muon.diagnostics.synthetic import MatrixSensing

LR = 0.02
POWERS = (0.0, 0.25, 0.5, 1.0, 2.0)
PROBLEMS = [
    {"measurements": measurements, "rank": rank}
    for measurements in (64, 128, 192)
    for rank in (1, 2, 8)
]
RULES = ("polar", "gradient")
LABELS = {"polar": "polar steps", "gradient": "gradient steps, same norm"}


def run(parts: Parts, quick: bool) -> dict[str, Any]:
    """Return solutions, dynamics, and the one-step claim."""
    size = {"copies": 4, "steps": 100} if quick else {"copies": 16, "steps": 500}
    tasks = {
        f"p{one['measurements']}_rank{one['rank']}": Task(descend, {**one, **size})
        for one in PROBLEMS
    }
    draws = 200 if quick else 2000
    tasks["one_step"] = Task(one_step, {"draws": draws})
    found = parts(tasks)
    return {"size": size, "one_step": found.pop("one_step"), "problems": list(found.values())}


def descend(measurements: int, rank: int, copies: int, steps: int) -> dict[str, Any]:
    """Return the effect of both methods on the spectrum, for one kind of problem, 16 × 16."""
    problem = diagnostics.matrix_sensing(
        16, 16, measurements, rank=rank, steps=1, batch=(copies,), dtype=torch.float64
    )
    found: dict[str, Any] = {"measurements": measurements, "rank": rank}
    for rule in RULES:
        found[rule] = dynamics(path_of(problem, rule, steps))
    found["truth"] = diagnostics.effective_rank(problem.truth).mean().item()
    return found


def path_of(problem: MatrixSensing, rule: str, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weight and step, (copies, m, n), at every step of ``matrix_sensing``'s descent."""
    directions: dict[str, Callable[[Tensor], Tensor]] = {
        "polar": lambda gradient: polar_factor(gradient, method="svd"),
        "gradient": norm_matched,
    }
    weight = torch.zeros_like(problem.truth)
    flat = problem.operators.flatten(-2)  # (copies, p, mn)
    for step in range(steps):
        residual = (flat @ weight.flatten(-2).unsqueeze(-1)).squeeze(-1) - problem.targets
        gradient = (residual.unsqueeze(-2) @ flat).reshape(weight.shape) / flat.shape[-2]
        change = -LR * (1 - step / steps) * directions[rule](gradient)
        yield weight, change
        weight = weight + change
    yield weight, torch.zeros_like(weight)


def norm_matched(gradient: Tensor) -> Tensor:
    """Return the gradient, scaled to the Frobenius norm of its polar factor."""
    norm = torch.linalg.matrix_norm(gradient, keepdim=True)
    return gradient * (min(gradient.shape[-2:]) ** 0.5 / norm)


def dynamics(path: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return the effective rank over the steps, and how well first order predicts the entropy."""
    ranks, foretold, happened = [], [], []
    before: tuple[Tensor, Tensor] | None = None  # entropy, and its predicted change
    for weight, change in path:
        if not weight.any():  # zero weights have no spectrum
            continue
        entropy = diagnostics.spectral_entropy(weight)
        if before is not None:
            happened.append(entropy - before[0])
            foretold.append(before[1])
        ranks.append(entropy.exp().mean().item())
        before = entropy, entropy_change(weight, change)
    expected, actual = torch.stack(foretold), torch.stack(happened)  # (steps, copies)
    clear = actual.abs() > 1e-9
    agree = (expected.sign() == actual.sign())[clear]
    return {
        "effective_rank": ranks,
        "final": ranks[-1],
        "sign_agrees": agree.double().mean().item(),
        "flattens": (actual > 0).double().mean().item(),
        "condition_holds": (expected > 0).double().mean().item(),
        "correlation": torch.corrcoef(torch.stack([expected.flatten(), actual.flatten()]))[
            0, 1
        ].item(),
        "shown": [expected[:, 0].tolist(), actual[:, 0].tolist()],
    }


def entropy_change(weight: Tensor, change: Tensor) -> Tensor:
    """The first-order change of the spectral entropy, −2 Cov_p(d/σ, ln p), (…).

    Args:
        weight: W, (…, m, n), with distinct nonzero singular values.
        change: D, (…, m, n).
    """
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    d = torch.einsum("...mi,...mn,...in->...i", U, change, Vh)  # u_iᵀ D v_i
    p = energies(sigma)
    growth, log = d / sigma, p.log()
    return -2 * ((p * growth * log).sum(-1) - (p * growth).sum(-1) * (p * log).sum(-1))


def one_step(draws: int, size: int = 16, eta: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Return the entropy that one bounded update adds, for powers of the gradient's spectrum.

    An update with the gradient's directions and d_i = (g_i/g₁)^q has spectral norm 1; q = 0 is the
    polar factor and q = 1 the gradient. Weights have a log-normal spectrum. ``flat_wins``: the
    share of draws in which no other power adds as much. ``adaptive``: an update that knows the
    weights and leaves out their largest singular value.
    """
    generator = torch.Generator().manual_seed(seed)

    def spectra() -> Tensor:  # (draws, size), descending
        values = torch.randn(draws, size, generator=generator, dtype=torch.float64).exp()
        return values.sort(-1, descending=True).values

    s, g = spectra(), spectra()
    shuffled = torch.argsort(torch.rand(draws, size, generator=generator), -1)
    rotations = [
        torch.linalg.qr(torch.randn(draws, size, size, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    ]
    turned = rotations[0] @ torch.diag_embed(s) @ rotations[1].mT
    cases = {
        "no weights yet": torch.zeros(draws, size, size, dtype=torch.float64),
        "aligned, same order": torch.diag_embed(s),
        "aligned, any order": torch.diag_embed(s.gather(-1, shuffled)),
        "not aligned": turned,
    }
    scale = eta * s.mean()
    found = {}
    for name, weight in cases.items():
        added = {q: gain(weight, scale * torch.diag_embed((g / g[:, :1]) ** q)) for q in POWERS}
        others = torch.stack([added[q] for q in POWERS if q > 0])
        found[name] = {
            "added": {f"{q:g}": values.mean().item() for q, values in added.items()},
            "flat_wins": (added[0.0] >= others.max(0).values - 1e-12).double().mean().item(),
        }
        if name.startswith("aligned"):
            values = weight.diagonal(dim1=-2, dim2=-1)
            kept = (values < values.max(-1, keepdim=True).values).double()
            adaptive = gain(weight, scale * torch.diag_embed(kept))
            found[name]["adaptive"] = adaptive.mean().item()
            found[name]["adaptive_wins"] = (adaptive > added[0.0]).double().mean().item()
    return found


def gain(weight: Tensor, change: Tensor) -> Tensor:
    """Return the spectral entropy that a step adds, (draws,); zero weights count as entropy 0."""
    before = diagnostics.spectral_entropy(weight).nan_to_num(0.0)
    return diagnostics.spectral_entropy(weight + change) - before


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw effective ranks over steps, predicted and actual changes, and the one-step claim."""
    figure, (left, middle, right) = grid(1, 3)
    shown = [one for one in results["problems"] if one["measurements"] == 128]
    for one, color in zip(shown, COLORS, strict=False):
        for rule, style in zip(RULES, ("-", "--"), strict=True):
            name = f"rank {one['rank']}, {LABELS[rule]}"
            ranks = one[rule]["effective_rank"]
            left.plot(range(1, len(ranks) + 1), ranks, style, color=color, lw=1.4, label=name)
    left.set_ylim(0, 23)  # up to 16, plus space for the labels
    left.legend(frameon=False, fontsize=7.5, loc="upper right", ncols=2)
    label(left, "step", "effective rank of W", "128 measurements of 256 entries")
    one = shown[1]
    for rule, color, marker in zip(RULES, COLORS, MARKERS, strict=False):
        foretold, happened = one[rule]["shown"]
        middle.plot(foretold, happened, marker, ms=3, color=color, alpha=0.6, label=LABELS[rule])
    middle.axline((0, 0), slope=1, color=MUTED, lw=0.8)
    middle.set_xscale("symlog", linthresh=1e-4)
    middle.set_yscale("symlog", linthresh=1e-4)
    middle.legend(frameon=False, fontsize=8)
    label(middle, "−2 Cov(d/σ, ln p)", "change of the entropy", "foretold and actual, a step each")
    for (name, case), color, marker in zip(
        results["one_step"].items(), COLORS, MARKERS, strict=False
    ):
        powers = [float(q) for q in case["added"]]
        right.plot(powers, list(case["added"].values()), color=color, marker=marker, label=name)
    right.axhline(0, color=MUTED, lw=0.8)
    right.legend(frameon=False, fontsize=8)
    power = "power q of the update (g/g₁)^q; 0: polar factor, 1: gradient"
    label(right, power, "entropy added", "one step of spectral norm 1")
    save(figure, path)


def lines(results: dict[str, Any]) -> list[str]:
    """Return the results in words."""
    said = []
    for one in results["problems"]:
        parts = ", ".join(
            f"{rule} {one[rule]['final']:.1f} (condition in {one[rule]['condition_holds']:.0%} of "
            f"the steps, sign right in {one[rule]['sign_agrees']:.0%})"
            for rule in RULES
        )
        said.append(
            f"{one['measurements']} measurements, rank {one['rank']} (effective "
            f"{one['truth']:.1f}): {parts}"
        )
    for name, case in results["one_step"].items():
        extra = f", adaptive wins {case['adaptive_wins']:.0%}" if "adaptive_wins" in case else ""
        said.append(f"one step, {name}: the flat update wins {case['flat_wins']:.0%}{extra}")
    return said
