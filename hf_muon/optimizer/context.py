"""The data of one param group during a step.

In: the settings, the rule and the gradients of a group. Out: a record that the parts of a step pass
on, and in which they collect errors of stages and maps that may fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from hf_muon.optimizer.outliers import Outliers
from hf_muon.polar import Workspace
from hf_muon.stages import Momentum, Rule

Settings = Mapping[str, Any]


@dataclass
class Step:
    """The data of one param group during a step.

    ``gradients`` are this rank's pieces, ``momenta`` the β of each matrix, and ``counts`` the
    number of earlier steps of each parameter. ``outliers`` tracks matrices that overflow in half
    precision, and ``failures`` the errors of a map that may fail.
    """

    settings: Settings
    rule: Rule
    gradients: list[Tensor]
    momenta: list[list[Momentum]]
    counts: list[Tensor]
    workspace: Workspace
    outliers: Outliers = field(default_factory=Outliers)
    failures: list[Exception] = field(default_factory=list)

    @contextmanager
    def guarded(self) -> Iterator[list[Tensor]]:
        """Keep an error of work that may fail, and go on with a list that may stay empty.

        The error may be on one rank only, while others wait for that rank's part of the step.
        """
        found: list[Tensor] = []
        try:
            yield found
        except Exception as error:  # anything that a decomposition or a user's function raises
            found.clear()
            self.failures.append(error)

    @cached_property
    def numbers(self) -> list[int]:
        """The number of this step, from 1, for each parameter."""
        return [int(count) + 1 for count in self.counts]
