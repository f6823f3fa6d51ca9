"""Parameters that need a gradient and that the optimizer does not hold.

In: the steps of an optimizer, and the model that it was made for. Out: one warning for each
parameter that was unfrozen, added or replaced since, by name, within ten steps. A warning, because
such runs go on with any optimizer, and a callback may add the group later.
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

# A look costs 0.2 ms for a LLaMA of 32 layers, and a step 0.05 ms more in the mean, with the count
# of gradients; the Trainer walks through `model.parameters()`, which takes 0.4 ms, several times.
EVERY = 10


class Watch:
    """Looks for parameters that the optimizer does not train, now and then.

    At the first step, whenever the number of gradients in the groups changes (as when adapters are
    switched), and at every tenth step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.begin(model)

    def begin(self, model: nn.Module, known: Iterable[str] = ()) -> None:
        """Training begins: say all anew, but what is known not to be trained here."""
        self.model: ReferenceType[nn.Module] = ref(model)
        self.said = set(known)
        self.steps, self.gradients = 0, -1

    def before_step(self, optimizer: Muon, *_: Any) -> None:
        """A hook of the optimizer."""
        if optimizer.is_flattened:  # it is called for some groups at a time
            return
        groups = optimizer.param_groups
        gradients = sum([p.grad is not None for group in groups for p in group["params"]])
        if gradients != self.gradients or self.steps % EVERY == 0:
            self.look(optimizer)
        self.gradients, self.steps = gradients, self.steps + 1

    def look(self, optimizer: Muon) -> None:
        """Warn of each parameter once."""
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
    """The watch of an optimizer, which a first call begins."""
    found = _watches.get(optimizer)
    if found is None:
        found = _watches[optimizer] = Watch(model)
        optimizer.register_step_pre_hook(found.before_step)
    return found


def untrained(model: nn.Module, optimizer: Muon) -> list[str]:
    """Names of the parameters that need a gradient and are in no group."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    every = list(_parameters(model))
    if all([id(p) in held for p in every if p.requires_grad]):
        return []
    if any(id(p) in held for p in every):
        return [name for name, p in trainable(model) if id(p) not in held]
    # DeepSpeed has put tensors of its own into the groups; the names are still there.
    named = {name for group in optimizer.param_groups for name in group.get("param_names", [])}
    return [name for name, _ in trainable(model) if name not in named] if named else []


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those of a model, tied ones several times; ``parameters()`` takes several times as long."""
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            yield from [p for p in module._parameters.values() if p is not None]
            modules += module._modules.values()
