"""A routing plan as text.

In: the routes of a plan, its totals and fingerprint. Out: plain text with one line per parameter
(or per parameter of a repeated layer), totals per reason, and the names of parameters that no rule
knows. LoRA's A and B are listed with their partner, rank and scaling.
"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from hf_muon.routing.route import Route
from hf_muon.shown import shape


def render(
    routes: Sequence[Route], totals: dict[str, int], fingerprint: str, *, compact: bool
) -> str:
    """Return the plan as a table, a summary per kind, and a paragraph on unknown parameters."""
    lines = [text(_routes(routes, compact=compact)), text(_summary(routes))]
    lines.append(f"{_totals(totals)} Fingerprint {fingerprint}.")
    unknown = [route for route in routes if route.kind == "unknown"]
    if unknown:
        named = "\n".join(dict.fromkeys(f"  {_pattern(r.name)} {shape(r.shape)}" for r in unknown))
        lines.append(
            f"UNKNOWN: {len(unknown)} parameter(s) that no rule knows went to AdamW. Name them in "
            f"muon_params if they are linear maps:\n{named}"
        )
    return "\n".join(lines)


def _routes(routes: Sequence[Route], *, compact: bool) -> Table:
    adapted = any(route.factor for route in routes)
    of_adapters = ("partner", "rank", "scaling") if adapted else ()
    scaled = any(route.lr_multiplier != 1 for route in routes)
    rates = ("decay", "rate")[: 1 + scaled]
    table = Table("parameter", "shape", "algorithm", "matrices", *of_adapters, *rates, "reason")
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for route in routes:
        name = _pattern(route.name) if compact else route.name
        cells = (shape(route.shape), route.algorithm, _matrices(route))
        adapter = _adapter(route) if adapted else ()
        rates = ("yes" if route.decay else "no", f"× {route.lr_multiplier:g}")[: 1 + scaled]
        rows[(name, *cells, *adapter, *rates, route.reason)].append(route.name)
    for (pattern, *row), names in rows.items():
        table.add_row(names[0] if len(names) == 1 else f"{pattern}  ({len(names)} times)", *row)
    return table


def _matrices(route: Route) -> str:
    return " + ".join(
        f"{count} of {shape(sides)}"
        for sides, count in Counter((m.rows, m.cols) for m in route.matrices).items()
    )


def _adapter(route: Route) -> tuple[str, str, str]:
    """Return partner, rank and scaling of LoRA's A or B; blanks for any other parameter."""
    if route.factor is None:
        return "", "", ""
    matrix = route.matrices[0]
    rank = matrix.rows if route.factor == "A" else matrix.cols  # A (r, n), B (m, r)
    return _partner(route), str(rank), f"{route.scaling:g}"


def _partner(route: Route) -> str:
    """Return the partner's name without the modules that contain both."""
    if route.pair is None:
        return "none"
    own, other = route.name.split("."), route.pair.split(".")
    shared = next(i for i, steps in enumerate(zip(own, other, strict=False)) if len({*steps}) > 1)
    return ".".join(other[shared:])


def _summary(routes: Sequence[Route]) -> Table:
    table = Table("algorithm", "kind", "tensors", "matrices", "parameters")
    kinds: dict[tuple[str, str], list[Route]] = defaultdict(list)
    for route in routes:
        kinds[route.algorithm, route.kind].append(route)
    for (algorithm, kind), of_kind in sorted(kinds.items(), reverse=True):
        matrices = sum(len(route.matrices) for route in of_kind)
        size = sum(route.numel for route in of_kind)
        table.add_row(algorithm, kind, str(len(of_kind)), str(matrices or ""), f"{size:,}")
    return table


def _totals(totals: dict[str, int]) -> str:
    return (
        f"Muon: {totals['muon_parameters']:,} parameters in {totals['muon_matrices']:,} matrices "
        f"of {totals['muon_tensors']:,} tensors. "
        f"AdamW: {totals['adamw_parameters']:,} parameters in {totals['adamw_tensors']:,} tensors. "
        f"Frozen: {totals['frozen_tensors']:,} tensors."
    )


def _pattern(name: str) -> str:
    """Return the name with its layer numbers replaced by stars."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def text(table: Table) -> str:
    """Render a table as wide as it needs to be: a name cut in two cannot be searched for."""
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    console.width = console.measure(table).maximum
    with console.capture() as capture:
        console.print(table)
    return capture.get()
