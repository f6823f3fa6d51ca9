"""What a model declares about itself, collected once per routing call.

In: a model, possibly wrapped (DDP, ``torch.compile``, a DeepSpeed engine). Out: a
:class:`Survey` with every trainable parameter as a :class:`Candidate` — clean name, owner, path —
and the facts that the rules need: embeddings and heads by identity, backbones, repeated stacks.
A survey is keyed by object identity and must not outlive the call that made it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from hf_muon.distributed.find import is_dtensor

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

# Child names that a wrapper inserts, by the wrapper's class. A user's own module called "module"
# keeps its name, because its parent is none of these.
WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "PipelineEngine": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


@dataclass(frozen=True)
class Candidate:
    """A trainable parameter and where it is in the model."""

    name: str
    raw_name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    leaf: str
    path: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.modules[-1]

    @property
    def parent(self) -> nn.Module | None:
        """The module that holds the owner."""
        return self.modules[-2] if len(self.modules) > 1 else None


@dataclass
class Survey:
    """The facts that the rules need; sets, and keys of ``sharing``, are ``id()`` values."""

    candidates: list[Candidate] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    sharing: dict[int, str] = field(default_factory=dict)
    embeddings: set[int] = field(default_factory=set)
    heads: set[int] = field(default_factory=set)
    outside_backbone: set[int] = field(default_factory=set)
    stacks: set[int] = field(default_factory=set)
    label_rows: set[int] = field(default_factory=set)
    classifiers: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)
    knows_heads: bool = False

    def in_stack(self, candidate: Candidate) -> bool:
        """Whether the parameter is in a repeated stack of blocks."""
        return any(id(module) in self.stacks for module in candidate.modules[:-1])

    def holds_blocks(self, module: nn.Module) -> bool:
        """Whether a module contains embeddings or repeated blocks, as a backbone does."""
        return any(isinstance(m, EMBEDDINGS) or id(m) in self.stacks for m in module.modules())


def survey(model: nn.Module) -> Survey:
    """Walk through a model once and collect what the rules need."""
    base, facts = _base(model), Survey()
    _walk(model, facts)
    facts.sharing = _sharing(facts.candidates)
    for module in model.modules():
        if isinstance(module, EMBEDDINGS):
            facts.embeddings.update(map(id, module.parameters(recurse=False)))
        if _is_stack(module):
            facts.stacks.add(id(module))
    facts.embeddings |= _accessor(base, "get_input_embeddings")
    for module in base.modules():
        if module is base or _is_pretrained(module):
            facts.heads |= _accessor(module, "get_output_embeddings")
    for module, towers in _backbones(base):
        inside = {id(m) for tower in towers for m in tower.modules()}
        facts.outside_backbone.update(id(m) for m in module.modules() if id(m) not in inside)
    facts.label_rows = _label_rows(base)
    facts.classifiers = _classifiers(base)
    facts.experts = {count for module in base.modules() for count in _counts_of_experts(module)}
    facts.knows_heads = bool(facts.classifiers) or any(
        _is_pretrained(m) or (isinstance(m, nn.Linear) and id(m.weight) in facts.embeddings)
        for m in base.modules()
    )
    return facts


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (clean name, trainable parameter), each once, in the order of ``named_parameters``."""
    seen = set()
    for _, name, module in named_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                if parameter.requires_grad:
                    yield f"{name}.{leaf}".lstrip("."), parameter


def named_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield ``(raw name, clean name, module)`` in the order of ``named_modules``."""
    clean: dict[str, str] = {}
    kinds: dict[str, nn.Module] = {}
    for raw, module in model.named_modules():
        above, _, step = raw.rpartition(".")
        if raw == "" or _wraps(kinds[above], step):
            clean[raw] = clean.get(above, "")
        else:
            clean[raw] = f"{clean[above]}.{step}".lstrip(".")
        kinds[raw] = module
        yield raw, clean[raw], module


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, a compiled module or a DeepSpeed engine."""
    while True:
        inner = next((c for name, c in model.named_children() if _wraps(model, name)), None)
        if inner is None:
            return model
        model = inner


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return the whole shape; under ZeRO-3 it is in ``ds_shape``, and ``shape`` is (0,)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _wraps(module: nn.Module, child: str) -> bool:
    return any(WRAPPERS.get(cls.__name__) == child for cls in type(module).__mro__)


def _walk(model: nn.Module, facts: Survey) -> None:
    modules: dict[str, nn.Module] = {}
    first_name: dict[int, str] = {}
    for raw, clean, module in named_modules(model):
        modules[raw] = module
        steps = raw.split(".") if raw else []
        above = tuple(modules[".".join(steps[:depth])] for depth in range(len(steps) + 1))
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{clean}.{leaf}".lstrip(".")
            if id(parameter) in first_name:
                facts.aliases[name] = first_name[id(parameter)]
                continue
            first_name[id(parameter)] = name
            if not parameter.requires_grad:
                facts.frozen.append(name)
                continue
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"{name} belongs to a lazy module and has no shape yet. Run one batch through "
                    "the model before the Trainer or the optimizer is made."
                )
            facts.candidates.append(
                Candidate(
                    name=name,
                    raw_name=f"{raw}.{leaf}".lstrip("."),
                    parameter=parameter,
                    shape=shape_of(parameter),
                    leaf=leaf,
                    path=tuple(clean.split(".")) if clean else (),
                    modules=above,
                )
            )


def _sharing(candidates: Iterable[Candidate]) -> dict[int, str]:
    """Return, for parameters that are others' memory, the name of another one of that memory."""
    of_memory: dict[tuple[int, int], list[Candidate]] = {}
    for one in candidates:
        has_storage = one.parameter.layout is torch.strided and not is_dtensor(one.parameter)
        if has_storage and one.parameter.numel():
            storage = one.parameter.untyped_storage()._cdata
            of_memory.setdefault((storage, int(one.parameter.storage_offset())), []).append(one)
    groups = [group for group in of_memory.values() if len(group) > 1]
    return {id(one.parameter): group[one is group[0]].name for group in groups for one in group}


def _base(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers and PEFT."""
    model = unwrapped(model)
    get_base_model = getattr(model, "get_base_model", None)
    base = get_base_model() if callable(get_base_model) else None
    return base if isinstance(base, nn.Module) else model


def _is_pretrained(module: nn.Module) -> bool:
    """Whether a module follows transformers' conventions, without importing transformers."""
    return isinstance(getattr(module, "base_model_prefix", None), str) and hasattr(module, "config")


def _accessor(module: nn.Module, name: str) -> set[int]:
    """Return the ids of the parameters of what an accessor returns."""
    accessor = getattr(module, name, None)
    if not callable(accessor):
        return set()
    try:
        found = accessor()
    except (NotImplementedError, AttributeError, TypeError):  # a model without such a part
        return set()
    parts = found if isinstance(found, tuple | list) else [found]
    return {id(p) for part in parts for p in _parameters(part)}


def _parameters(part: object) -> Iterable[nn.Parameter]:
    if isinstance(part, nn.Parameter):
        return [part]
    return part.parameters() if isinstance(part, nn.Module) else []


def _backbones(base: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield models with their backbones; heads are what is outside the backbone.

    A transformers model names its backbone. If it does not, it may consist of two models that do
    (encoder and decoder). In a user's module around such models, those models are the backbone.
    """
    prefix = getattr(base, "base_model_prefix", None)
    backbone = getattr(base, prefix, None) if isinstance(prefix, str) and prefix else None
    if isinstance(backbone, nn.Module) and backbone is not base:
        yield base, [backbone]
        return
    towers = _topmost_pretrained(base)
    if towers and not _is_pretrained(base):
        yield base, towers
    for tower in towers:
        yield from _backbones(tower)


def _topmost_pretrained(base: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in base.children():
        found += [child] if _is_pretrained(child) else _topmost_pretrained(child)
    return found


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of blocks, not of bare layers (a head per codebook, an MLP)."""
    entries = list(module.children())
    if isinstance(module, nn.ModuleList) and entries:
        return all(any(entry.children()) for entry in entries)
    if isinstance(module, nn.Sequential) and len(entries) > 1:
        return len(set(map(type, entries))) == 1 and any(entries[0].children())
    return False


def _label_rows(base: nn.Module) -> set[int]:
    """Return the numbers of rows that reveal a head: vocabulary size, number of labels."""
    config: Any = getattr(base, "config", None)
    if not _is_pretrained(base):
        tables = [(n, m) for n, m in base.named_modules() if isinstance(m, EMBEDDINGS)]
        rows = {m.weight for n, m in tables if not _POSITIONS.search(n.rpartition(".")[2])}
        tokens = {shape_of(weight)[0] for weight in rows if isinstance(weight, Tensor)}
        return tokens | _counts(_inmost(base), _LABEL_KEYS)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return _counts(config, _LABEL_KEYS) | _counts(text, _LABEL_KEYS)


_POSITIONS = re.compile(r"pos|wpe|time|type")  # embeddings whose size no head shares
_LABEL_KEYS = ("vocab_size", "num_labels", "num_classes")


def _counts(holder: object, keys: Iterable[str]) -> set[int]:
    """Return the numbers above one that an object has under some names."""
    values = [getattr(holder, key, None) for key in keys]
    return {value for value in values if isinstance(value, int) and value > 1}


def _classifiers(base: nn.Module) -> set[int]:
    """Return output layers of models outside transformers: by timm's accessor or a common name.

    A name counts only if no linear layer comes after it. ``head`` may be a module of several.
    """
    found: set[int] = set()
    for module in base.modules():
        found |= _accessor(module, "get_classifier")
    if found or _is_pretrained(base):
        return found
    every = [module for module in base.modules() if isinstance(module, nn.Linear)]
    for name, child in _inmost(base).named_children():
        layers = [module for module in child.modules() if module is every[-1]] if every else []
        if name in _HEAD_NAMES and layers and not any(map(_is_stack, child.modules())):
            found.update(map(id, layers[0].parameters()))
    return found


_HEAD_NAMES = ("head", "heads", "fc", "lm_head", "classifier")


def _inmost(module: nn.Module) -> nn.Module:
    """Return the model inside modules that train nothing else."""
    while not module._parameters:
        inside = [child for child in module.children() if any(True for _ in child.parameters())]
        if len(inside) != 1:
            break
        module = inside[0]
    return module


def _counts_of_experts(module: nn.Module) -> set[int]:
    """Return the numbers of experts that a module or its configuration declares."""
    config = getattr(module, "config", None)
    named = vars(config) if config is not None and hasattr(config, "__dict__") else {}
    said = {value for key, value in named.items() if _EXPERT_KEY.search(key)}
    for name, child in module.named_children():
        if name == "experts":
            weight = next(child.parameters(recurse=False), None)
            said.add(len(list(child.children())) if weight is None else shape_of(weight)[0])
    return {value for value in said if isinstance(value, int) and value > 1}


_EXPERT_KEY = re.compile(r"(?:num|n)_(?:(?!shared)\w+_)?experts$")
