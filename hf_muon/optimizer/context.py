"""What a step has of a param group.

In: the settings, the rule and the gradients of a group. Out: a record that the parts of a step
hand on; errors of what may fail are collected in it.
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
    """What a step has of a param group.

    ``gradients`` are this rank's parts, ``momenta`` the β of each matrix and ``counts`` the steps
    before, of each parameter. What half precision is not enough for is in ``outliers``, and what a
    map that may fail raised in ``failures``.
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
        """Keep an error of what may fail, and go on with a list that may stay empty.

        It may be of one rank alone, and others wait for its part of the step.
        """
        found: list[Tensor] = []
        try:
            yield found
        except Exception as error:  # whatever a decomposition or a stranger's function raises
            found.clear()
            self.failures.append(error)

    @cached_property
    def numbers(self) -> list[int]:
        """The number of this step, from 1, of each parameter."""
        return [int(count) + 1 for count in self.counts]
