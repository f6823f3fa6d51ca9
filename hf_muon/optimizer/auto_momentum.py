"""``momentum="auto"``: which of several averages best predicts the next gradient.

In: averages of the same gradients with windows of 5 to 100 steps. Out: for each matrix, the average
in use. Each is scored by how well it predicts the next gradient, before that gradient is added to
it. The noise in the new gradient is independent, so a longer average gains from the noise that it
averages away and loses from signal that is out of date.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hf_muon.optimizer.momentum import term_names
from hf_muon.polar import devices
from hf_muon.rules import KERNELS
from hf_muon.stages import Buffer, Given, Stage, Statistic, in_dtype_of, square_norm

# The windows 1/(1−β), and the one that is used until another is known to be better.
WINDOWS = (5, 10, 20, 50, 100)
MOMENTA = tuple(1 - 1 / T for T in WINDOWS)
_FIRST = WINDOWS.index(20)
_TERMS = len(WINDOWS)
# Scores are averaged over this many steps, and another average must lead by this many standard
# errors.
SCORED_OVER = 100
LEAD = 3.0


def chosen(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Return the average in use, after updating all of them; with Nesterov (1−β)X + βM."""
    terms = buffers[:_TERMS]
    like = in_dtype_of(x, terms[0])
    for term, beta in zip(terms, MOMENTA, strict=True):
        torch._foreach_lerp_(term, like, 1 - beta)
    found = []
    for number, (one, choice) in enumerate(zip(like, given.whole, strict=True)):
        use = choice.to(one)  # one-hot, so that no rank waits to read the choice
        average = torch.zeros_like(one)
        for share, term in zip(use, terms, strict=True):
            average += share * term[number]
        if given.settings["nesterov"]:
            average = torch.lerp(one, average, (use * use.new_tensor(MOMENTA)).sum())
        found.append(average)
    return found


def _measure(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """‖X‖², then ⟨X, m_k⟩ and ‖m_k‖² of each average, float64."""
    found = []
    for number, one in enumerate(x):
        terms = [term[number] for term in buffers[:_TERMS]]
        same = one.to(terms[0].dtype)
        dtype = devices.widest(one.device)
        dots = [(same * term).sum(dtype=dtype) for term in terms]
        found.append(torch.stack([square_norm(same), *dots, *map(square_norm, terms)]))
    return found


def _choose(sums: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Score the averages, and switch to another one if its lead exceeds the noise of the scores.

    ⟨G, m_k⟩ is an unbiased estimate of how much of the signal S is in m_k. What disturbs a polar
    factor is not all of the noise in m_k but its largest singular value: of N = ‖m_k‖² − ⟨S, m_k⟩
    that is (√m + √n)²/(mn)·N. So the score is ⟨G, m_k⟩/√(⟨S, m_k⟩ + (√m + √n)²/(mn)·N): up to a
    constant common to all k, the alignment of the polar factor with S. Both terms are divided by
    norms at every step, so that no single gradient counts for more than others.

    State of each matrix: the choice (from 1), the weight of its averages so far, and the averages
    of the shares ⟨G, m_k⟩/‖m_k‖², of the scores and of their squares.
    """
    numbers = torch.stack(sums)
    kept = torch.stack(buffers[0])
    squares = numbers[:, 1 + _TERMS :]
    dots = numbers[:, 1 : 1 + _TERMS]
    # An average that began at zero is smaller by 1 − βᵗ.
    filled = [[1 - beta ** max(step - 1, 1) for beta in MOMENTA] for step in given.steps]
    shares = dots / squares * numbers.new_tensor(filled)
    shares = torch.nan_to_num(shares, 0.0, 0.0, 0.0).clamp(-2, 2).to(kept)
    cosines = torch.nan_to_num(dots / (numbers[:, :1] * squares).sqrt(), 0.0, 0.0, 0.0).to(kept)

    rate = 1 / SCORED_OVER
    kept[:, 1].lerp_(torch.ones_like(kept[:, 1]), rate)
    weight, averages = kept[:, 1:2], kept[:, 2:].view(-1, 3, _TERMS)
    averages[:, 0].lerp_(shares, rate)
    signal = (averages[:, 0] / weight).clamp(0, 1)
    edges = kept.new_tensor([sum(side**-0.5 for side in shape) ** 2 for shape in given.shapes])
    scores = cosines * (signal + edges[:, None] * (1 - signal)).rsqrt()
    scores -= scores.mean(1, keepdim=True)  # only differences between averages matter
    averages[:, 1].lerp_(scores, rate)
    averages[:, 2].lerp_(scores.square(), rate)
    mean, square = (averages[:, 1:] / weight[..., None]).unbind(1)
    # The effective number of scores: a plain mean of that many has the same variance.
    equal = (2 * SCORED_OVER - 1) * weight / (2 - weight)
    error = ((square - mean.square()).clamp(min=0) / equal).sqrt()

    now = torch.where(kept[:, :1] > 0, kept[:, :1] - 1, _FIRST).long()
    best = mean.argmax(1, keepdim=True)
    lead = mean.gather(1, best) - mean.gather(1, now)
    leads = lead > LEAD * (error.gather(1, best) + error.gather(1, now))
    now = torch.where(leads & (equal > SCORED_OVER / 2), best, now)
    kept[:, :1] = now + 1
    for own, new in zip(buffers[0], kept, strict=True):
        own.copy_(new)
    return list(torch.nn.functional.one_hot(now[:, 0], _TERMS))


@lru_cache(maxsize=4)
def auto_stage(terms: int, second: str) -> Stage:
    """Return the filter with its state; ``second`` is the buffer name of its second average."""
    averages = map(Buffer, term_names(_TERMS, second))
    scores = Buffer("momentum_scores", "numbers", length=2 + 3 * _TERMS, scales=False)
    statistic = Statistic(_measure, _choose, 1 + 2 * _TERMS, of_input=False)
    return Stage(chosen, (*averages, scores), statistic, may_fail=False, counts=True)


KERNELS["auto"] = auto_stage


def momenta_in_use(scores: Tensor) -> list[float]:
    """Return β of each matrix of a parameter under ``momentum="auto"``.

    Args:
        scores: ``momentum_scores`` in the state of the parameter.
    """
    places = torch.where(scores[:, 0] > 0, scores[:, 0] - 1, _FIRST).long().tolist()
    return [MOMENTA[place] for place in places]
