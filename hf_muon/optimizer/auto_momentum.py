"""``momentum="auto"``: which of several averages says best where the next gradient points.

In: averages of one stream with windows of 5 to 100 steps, the terms of a kernel. Out: for each
matrix the one in use. Each is scored by its cosine with the next gradient, before that gradient is
added to it: the noise in it is fresh, so that a long average gains from what it averages away, and
loses from what it remembers too long.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hf_muon.optimizer.momentum import term_names
from hf_muon.rules import KERNELS
from hf_muon.stages import Buffer, Given, Stage, Statistic

# The averages: 1/(1−β), and the one that is used until another one is known to be better.
WINDOWS = (5, 10, 20, 50, 100)
MOMENTA = tuple(1 - 1 / T for T in WINDOWS)
_FIRST = WINDOWS.index(20)
_TERMS = len(WINDOWS)
# Scores are averaged over some steps, and another average must lead by so many standard errors.
_SCORED_OVER = 100
_LEAD = 3.0


def chosen(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """The average in use, after all are brought up to date; with Nesterov (1−β)X + βM."""
    terms = buffers[:_TERMS]
    like = [one.to(kept.dtype) for one, kept in zip(x, terms[0], strict=True)]
    for term, beta in zip(terms, MOMENTA, strict=True):
        torch._foreach_lerp_(term, like, 1 - beta)
    found = []
    for number, (one, choice) in enumerate(zip(like, given.whole, strict=True)):
        use = choice.to(one)  # a 1 among zeros: no rank waits to read which it is
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
        dots = [(same * term).sum(dtype=torch.float64) for term in terms]
        squares = [_square(term) for term in terms]
        found.append(torch.stack([_square(same), *dots, *squares]))
    return found


def _square(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def _choose(sums: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Score the averages, and go over to another one where it leads beyond the noise of scores."""
    return [_choose_one(*one) for one in zip(sums, buffers[0], strict=True)]


def _choose_one(sums: Tensor, kept: Tensor) -> Tensor:
    """Of one matrix.

    ``kept`` has the choice (from 1), the weight of the averages of scores so far, these averages,
    and those of their squares.
    """
    G, dots, squares = sums[:1], sums[1 : 1 + _TERMS], sums[1 + _TERMS :]
    norms = (G * squares).sqrt()
    cosines = torch.where(norms > 0, dots / norms, 0.0).to(kept)
    scores = cosines - cosines.mean()  # what all have in common says nothing of their differences
    news = torch.cat([torch.ones_like(kept[:1]), scores, scores.square()])
    kept[1:].lerp_(news, 1 / _SCORED_OVER)
    weight = kept[1]
    mean, square = (kept[2:] / weight).view(2, _TERMS)
    # The number of scores that a mean with equal weights would take for the same variance.
    equal = (2 * _SCORED_OVER - 1) * weight / (2 - weight)
    variance = (square - mean.square()).clamp(min=0) / equal
    now = torch.where(kept[0] > 0, kept[0] - 1, _FIRST).long()
    best = mean.argmax()
    lead = mean[best] - mean[now]
    leads = (lead > _LEAD * (variance[best] + variance[now]).sqrt()) & (equal > _SCORED_OVER / 2)
    now = torch.where(leads, best, now)
    kept[0] = now + 1
    found: Tensor = torch.nn.functional.one_hot(now, _TERMS)
    return found


@lru_cache(maxsize=4)
def auto_stage(terms: int, second: str) -> Stage:
    """The filter, and what it keeps; ``second`` is the name of its second average."""
    averages = map(Buffer, term_names(_TERMS, second))
    scores = Buffer("momentum_scores", "numbers", length=2 + 2 * _TERMS, scales=False)
    statistic = Statistic(_measure, _choose, 1 + 2 * _TERMS, of_input=False)
    return Stage(chosen, (*averages, scores), statistic, may_fail=False)


KERNELS["auto"] = auto_stage


def momenta_in_use(scores: Tensor) -> list[float]:
    """β of each matrix, from the state of a parameter."""
    places = torch.where(scores[:, 0] > 0, scores[:, 0] - 1, _FIRST).long().tolist()
    return [MOMENTA[place] for place in places]
