"""Coefficients of the odd quintic polynomials that drive singular values to one.

In: the name of a family of coefficients and a number of steps.
Out: one triple (a, b, c) per step, for p(x) = a·x + b·x³ + c·x⁵ applied to every singular value.
Each family is one entry of ``FAMILIES``; ``register_coefficients`` adds more.
``scripts/coefficients.py`` computes the tables below from their definitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from .precision import check_name
from .scale import STARTS

Triple = tuple[float, float, float]

# Keller Jordan, https://kellerjordan.github.io/posts/muon/, and torch.optim.Muon: the steepest
# slope at zero for which the composition still stays near one. It does not converge: five steps
# map singular values from 0.0055 up to [0.68, 1.13], and some smaller ones to as much as 1.20.
QUINTIC: Triple = (3.4445, -4.7750, 2.0315)

# Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932, algorithm 1: each step is
# the best quintic on the interval that the previous step produced, starting with [1e-3, 1].
# fmt: off
_POLAR_EXPRESS = (
    (8.287212051987673, -23.59588679274243, 17.300387552298638),
    (4.107059127880434, -2.9478499507133797, 0.5448431158232068),
    (3.9486908669697063, -2.9089021485665327, 0.551819147024149),
    (3.3184196490566853, -2.4884880181180957, 0.5100489394218686),
    (2.300652012746072, -1.6689039781067914, 0.4188073112535428),
    (1.8913014070584915, -1.2679958263950382, 0.3768040894048989),
    (1.8750014808325797, -1.250001645358357, 0.3750001645267014),
    (1.8749999980503396, -1.2499999961006791, 0.37499999805033957),
)
# The same construction for matrices scaled by their Schatten 4-norm. It is closer to the largest
# singular value than the Frobenius norm, so the other singular values start higher and need fewer
# steps: four steps from [0.003, 1], and half the lower end for each further step.
_TIGHT = (
    ((8.119022493172265, -23.11700658977021, 16.949274954780538),
     (3.861068853996014, -2.882749832246281, 0.5548508474020348),
     (3.0552860457233995, -2.28936483809237, 0.4875537052244666)),
    ((8.219101139134468, -23.401956991145386, 17.158199180442185),
     (4.0048760741544545, -2.92234680771019, 0.5491185342626974),
     (3.5235614314665, -2.639803525607799, 0.5272128337990574),
     (2.511527160645601, -1.8524483512513423, 0.43883263504863534)),
    ((8.270078310554224, -23.54710249463788, 17.264619146089164),
     (4.0808525839314935, -2.941189347531449, 0.5458668716324538),
     (3.8469976946225803, -2.8727517280891655, 0.5537120510612809),
     (3.026031670705986, -2.2668210882517354, 0.48501536908727083),
     (2.099198879986519, -1.4814080286821059, 0.3987930849942996)),
    ((8.29580563295744, -23.62035499295679, 17.318327515739465),
     (4.120332524243438, -2.9512530690001935, 0.5443425869759654),
     (3.998933580351357, -2.9209041966886113, 0.5493917208929237),
     (3.5005952529976887, -2.623013391170933, 0.5253060101485412),
     (2.4843036750004854, -1.829325512405006, 0.4362910823362846),
     (1.9167304991289764, -1.2956249409394025, 0.3795909509691122)),
    ((8.308729522705306, -23.657152728733248, 17.345307433704473),
     (4.14045846355324, -2.9564498123624143, 0.5436060301569688),
     (4.0777215245275045, -2.940398871233231, 0.5459924119235328),
     (3.8324948574642943, -2.862435843973859, 0.5525371596163925),
     (2.9965964263802816, -2.244047001636485, 0.4824531504590627),
     (2.0838510901988423, -1.4664746172042384, 0.39722342928279664),
     (1.8773896756828092, -1.252652639557263, 0.3752653628584302)),
    ((8.31520659340217, -23.675594663844, 17.358828969361632),
     (4.150619618129517, -2.9590899596325766, 0.5432441750531798),
     (4.118725216891352, -2.950839940667716, 0.5444025659923388),
     (3.99277779469467, -2.91941481787833, 0.5496777405625096),
     (3.477133744044658, -2.6058237266627753, 0.5233543544743151),
     (2.457516186707119, -1.8064215766504612, 0.43377846632242373),
     (1.912113396115176, -1.2906467267290849, 0.37908733072254835),
     (1.8750169058804005, -1.250018784182148, 0.3750018784221845)),
)
# fmt: on


class Family(NamedTuple):
    """A family of coefficients.

    Attributes:
        rows: Lists of triples, by increasing number of steps. For k steps, the first k triples of
            the shortest list that has at least k.
        fewest: The smallest number of steps; the largest is the length of the longest list.
        start: How matrices are scaled first, a key of ``STARTS``.
        safety: Every step but the last allows for an input larger by this ratio, so that rounding
            cannot push singular values out of the interval the step was made for.
        half_gram_safety: The same, for every step of the ``gram`` method in half precision, which
            rounds whole products of steps: with 1.01 some rank-deficient matrices diverge there.
            Costs up to 0.03 of accuracy.
        mirrors: Whether ``newton_schulz`` may compute one half of symmetric products and mirror
            it, which rounds differently from torch.optim.Muon.
    """

    rows: tuple[tuple[Triple, ...], ...]
    fewest: int = 1
    start: str = "frobenius"
    safety: float = 1.0
    half_gram_safety: float = 1.05
    mirrors: bool = True


FAMILIES = {
    "quintic": Family(((QUINTIC,) * 99,), half_gram_safety=1.0, mirrors=False),
    "polar_express": Family((_POLAR_EXPRESS,), fewest=3, safety=1.01),
    "tight": Family(_TIGHT, fewest=3, start="schatten", safety=1.01),
}
"""Families by name."""
# The largest value that a family may map singular values in [1e-3, 1] to; five steps of ``quintic``
# reach 1.20.
_LARGEST = 1.5
_GRID = [10 ** (-3 * i / 1000) for i in range(1001)]


@cache
def coefficients(name: str, steps: int, *, half_gram: bool = False) -> tuple[Triple, ...]:
    """Return the triples (a, b, c) of ``steps`` iterations, in the order they are applied.

    The safety ratio s of a family replaces p(x) by p(x/s), that is (a/s, b/s³, c/s⁵);
    ``half_gram`` selects the ratio for the ``gram`` method in half precision. Raises the errors of
    ``check_steps``.
    """
    check_steps(name, steps)
    family = FAMILIES[name]
    raw = next(row for row in family.rows if len(row) >= steps)[:steps]
    safety = [family.half_gram_safety if half_gram else family.safety] * steps
    if not half_gram:
        safety[-1] = 1.0
    return tuple((a / s, b / s**3, c / s**5) for (a, b, c), s in zip(raw, safety, strict=True))


def check_steps(coefficients: str, steps: int, argument: str = "steps") -> None:
    """Raise for an unknown family, or a number of steps that it has no triples for.

    Args:
        coefficients: a key of ``FAMILIES``.
        steps: number of iterations.
        argument: the name of the number of steps in error messages.

    Raises:
        TypeError: ``coefficients`` is not a string.
        ValueError: either value is not allowed.
    """
    check_name("coefficients", coefficients, tuple(FAMILIES))
    family = FAMILIES[coefficients]
    most = len(family.rows[-1])
    if not family.fewest <= steps <= most:
        others = "" if coefficients == "quintic" else "; 'quintic' takes 1 to 99"
        raise ValueError(
            f"{argument}={steps} with coefficients={coefficients!r}: {family.fewest} to {most} "
            f"steps are allowed{others}."
        )


def register_coefficients(
    name: str, triples: Sequence[Sequence[float]], *, start: str = "frobenius"
) -> None:
    """Add a family of coefficients for ``polar_factor`` and the optimizer.

    The triples are used as given, except that ``gram`` in half precision allows for inputs 5 %
    larger at every step. Fewer steps than triples take the first ones, if those stay within the
    same bounds. Checkpoints hold only the name: register it before you load one.

    Args:
        name: the value of ``coefficients`` that selects it: a Python identifier, not yet taken.
        triples: (a, b, c) of each step, for p(x) = a·x + b·x³ + c·x⁵ on singular values in (0, 1].
        start: ``frobenius`` or ``schatten``: the norm that matrices are divided by first.

    Raises:
        TypeError: a triple is not three numbers.
        ValueError: the name is not an identifier or is taken, the start is unknown, or a singular
            value in [0.001, 1] does not end in (0, 1.5].

    Example:
        >>> register_coefficients("cubic", [(1.5, -0.5, 0.0)] * 12)
        >>> polar_factor(x, coefficients="cubic", steps=12)
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name={name!r}: give a string of letters, digits and underscores.")
    check_name("start", start, tuple(STARTS))
    try:
        row = tuple((float(a), float(b), float(c)) for a, b, c in triples)
    except (TypeError, ValueError) as error:
        raise TypeError(f"triples={triples!r}: give three numbers (a, b, c) a step.") from error
    within = [_excess(row[: k + 1]) is None for k in range(len(row))]
    if not row or not within[-1]:
        said = f"take the singular value {_excess(row)}" if row else "are none"
        raise ValueError(
            f"The triples of coefficients {name!r} {said}; all in [0.001, 1] have to end in "
            f"(0, {_LARGEST}]. Give (a, b, c) of p(x) = a·x + b·x³ + c·x⁵, the first step first."
        )
    fewest = 1 + max((k + 1 for k, good in enumerate(within) if not good), default=0)
    family = Family((row,), fewest, start)
    if FAMILIES.setdefault(name, family) != family:
        raise ValueError(f"coefficients={name!r} exist with other triples: choose another name.")


def largest(triples: Sequence[Triple]) -> float:
    """Return the largest value that some triples map a singular value in [0.001, 1] to."""
    return max(_composed(triples, x) for x in _GRID)


def _excess(triples: Sequence[Triple]) -> str | None:
    """Describe the first singular value on a grid that ends out of bounds; None if none does."""
    for x in _GRID:
        y = _composed(triples, x)
        if not 0 < y <= _LARGEST:
            return f"{x:.4g} to {y:.4g}"
    return None


def _composed(triples: Sequence[Triple], x: float) -> float:
    for a, b, c in triples:
        x *= a + x * x * (b + x * x * c)
    return x
