"""Parameters that need a gradient but are not in the optimizer.

In: the steps of an optimizer, and the model that it was built for. Out: one warning, within ten
steps, for each parameter that was unfrozen, added or replaced since. It is only a warning, because
with any optimizer such runs continue, and a callback may still add the group.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn
from torch.distributed import get_node_local_rank

from hf_muon.optimizer import Muon
from hf_muon.routing.survey import trainable

logger = logging.getLogger(__name__)

# A check costs 0.2 ms for a LLaMA of 32 layers, plus 0.05 ms per step on average for counting
# gradients. For comparison: the Trainer walks through `model.parameters()` several times per step,
# which takes 0.4 ms.
EVERY = 10


class Watch:
    """Checks for parameters that the optimizer does not train.

    It checks at the first step, whenever the number of gradients in the groups changes (as when
    adapters are switched), and at every tenth step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.begin(model)

    def begin(self, model: nn.Module, known: Iterable[str] = ()) -> None:
        """Start over when training begins.

        Args:
            model: The model to watch.
            known: Names of parameters not to warn about. Default: none.
        """
        self.model: ReferenceType[nn.Module] = ref(model)
        self.said = set(known)
        self.steps, self.gradients = 0, -1

    def before_step(self, optimizer: Muon, *_: Any) -> None:
        """Check before a step of the optimizer, if it is time to."""
        if optimizer.is_flattened:  # each call gets only some of the groups
            return
        groups = optimizer.param_groups
        gradients = sum([p.grad is not None for group in groups for p in group["params"]])
        if gradients != self.gradients or self.steps % EVERY == 0:
            self.look(optimizer)
        self.gradients, self.steps = gradients, self.steps + 1

    def look(self, optimizer: Muon) -> None:
        """Warn once about each parameter."""
        model = self.model()
        found = untrained(model, optimizer) if model is not None else []
        names = [name for name in found if name not in self.said]
        self.said.update(names)
        if names and get_node_local_rank(fallback_rank=0) == 0:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            logger.warning(
                "The optimizer does not train %s%s: since it was made they were added, replaced "
                "or set to require a gradient, or its groups leave them out. Do that before the "
                "Trainer makes the optimizer; between two calls of train(), set trainer.optimizer "
                "= None, so that it makes another one, as a loop of your own does.",
                ", ".join(names[:5]),
                more,
            )


_watches: WeakKeyDictionary[Muon, Watch] = WeakKeyDictionary()


def watch(optimizer: Muon, model: nn.Module) -> Watch:
    """Return the watch of an optimizer; create it on the first call."""
    found = _watches.get(optimizer)
    if found is None:
        found = _watches[optimizer] = Watch(model)
        optimizer.register_step_pre_hook(found.before_step)
    return found


def untrained(model: nn.Module, optimizer: Muon) -> list[str]:
    """Return the names of parameters that need a gradient and are in no group."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    held = set(map(id, tensors))
    every = list(_parameters(model))
    if all([id(p) in held for p in every if p.requires_grad]):
        return []
    if any(id(p) in held for p in every):
        return [name for name, p in trainable(model) if id(p) not in held]
    if any(isinstance(p, nn.Parameter) and p.ndim > 1 for p in tensors):
        return [name for name, _ in trainable(model)]  # they are another model's, such as a copy's
    # DeepSpeed's tensors are flat, or plain ones, but the names are still there.
    named = {name for group in optimizer.param_groups for name in group.get("param_names", [])}
    return [name for name, _ in trainable(model) if name not in named] if named else []


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters, tied ones repeatedly; ``parameters()`` takes several times as long."""
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            yield from [p for p in module._parameters.values() if p is not None]
            modules += module._modules.values()
