"""Heads of models outside transformers, built like those of timm and nanoGPT; gates and routers."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from torch import nn
from zoo import ZOO

from hf_muon.config import MuonConfig
from hf_muon.routing import route

CLASSES, WIDTH = 12, 32


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width)


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))


class ClassifierHead(nn.Module):
    """timm's: a hidden layer, where there is one, before the output."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        if hidden:
            self.pre_logits = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.fc = nn.Linear(WIDTH, CLASSES)


class BasicBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH)


class Vit(nn.Module):
    def __init__(self, accessor: bool = False, **names: nn.Module) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(Block(), Block())
        for name, module in (names or {"head": nn.Linear(WIDTH, CLASSES)}).items():
            self.add_module(name, module)
        if accessor:
            self.get_classifier = lambda: tuple(getattr(self, name) for name in names)


def swin(hidden: bool = False) -> nn.Module:
    model = Vit(head=ClassifierHead(hidden))
    model.blocks = nn.Sequential(Stage(WIDTH), Stage(2 * WIDTH))
    return model


def resnet() -> nn.Module:
    stages = (nn.Sequential(BasicBlock(), BasicBlock()) for _ in range(2))
    layers = {f"layer{number}": stage for number, stage in enumerate(stages)}
    model = Vit(**layers, fc=nn.Linear(WIDTH, CLASSES))
    del model.blocks
    return model


def by_number() -> nn.Module:
    model = Vit(output=nn.Linear(WIDTH, CLASSES))
    model.num_classes = CLASSES
    return model


class Gpt(nn.Module):
    """nanoGPT: 50 tokens and a head of 64 rows, a multiple that suits the hardware."""

    def __init__(self, head: str = "lm_head") -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(50, WIDTH), "h": nn.ModuleList([Block(), Block()])}
        )
        self.add_module(head, nn.Linear(WIDTH, 64, bias=False))


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


HEADS = {
    "vit": (Vit, ["head.weight"]),
    "two heads, by the accessor": (
        lambda: Vit(True, dist=nn.Linear(WIDTH, CLASSES), out=nn.Linear(WIDTH, CLASSES)),
        ["dist.weight", "out.weight"],
    ),
    "swin": (swin, ["head.fc.weight"]),
    "convnext with a hidden layer": (lambda: swin(hidden=True), ["head.fc.weight"]),
    "torchvision's vit": (
        lambda: Vit(heads=nn.Sequential(nn.Linear(WIDTH, CLASSES))),
        ["heads.0.weight"],
    ),
    "num_classes": (by_number, ["output.weight"]),
    "nanogpt": (Gpt, ["lm_head.weight"]),
    "in a module of one's own": (lambda: Wrapped(Vit()), ["model.head.weight"]),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_outside_transformers_go_to_adamw(name, caplog):
    build, heads = HEADS[name]
    plan = route(build())
    assert [r.name for r in plan.routes if r.kind == "head" and len(r.shape) > 1] == heads
    hidden = {r.name for r in plan.muon}
    assert hidden >= {r.name for r in plan.routes if ".mlp." in r.name and "weight" in r.name}
    plan.param_groups(MuonConfig(lr=1.0))
    assert "No output head" not in caplog.text


def test_a_resnet_has_no_matrix_but_its_head_and_the_error_says_what_to_do():
    with pytest.raises(ValueError, match=r"\(conv, head, vector\)\. muon_params names kernels"):
        route(resnet()).param_groups(MuonConfig(lr=1.0))
    plan = route(resnet(), MuonConfig(muon_params=(r"conv1\.weight",)))
    assert {r.name for r in plan.adamw} >= {"fc.weight"}


@pytest.mark.parametrize("model", [Gpt("unembed"), nn.Sequential(Mlp())])
def test_a_head_that_is_not_recognized_is_said(model, caplog):
    plan = route(model)
    with caplog.at_level(logging.WARNING):
        plan.param_groups(MuonConfig(lr=1.0))
    assert "No output head was recognized" in caplog.text
    assert f"the last one is {plan.muon[-1].name}." in caplog.text


def test_a_head_that_is_named_is_not_asked_for(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    for pattern, said in ((r"4\.weight", False), (r"0\.weight", True)):  # the last layer; the first
        config = MuonConfig(lr=1.0, adamw_params=(pattern,))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            route(model, config).param_groups(config)
        assert ("No output head was recognized" in caplog.text) == said


def test_models_of_transformers_and_tied_heads_are_not_suspected(caplog):
    tied = Gpt("unembed")
    tied.unembed.weight = tied.transformer.wte.weight
    route(tied).param_groups(MuonConfig(lr=1.0))
    for name in ("llama", "clip"):
        route(ZOO[name].build()).param_groups(MuonConfig(lr=1.0))
    assert "No output head" not in caplog.text


# --- gates and routers --------------------------------------------------------------------------


class Router(nn.Module):
    """sentence-transformers' two towers: no router of experts."""

    def __init__(self) -> None:
        super().__init__()
        towers = {name: nn.Sequential(ZOO["bert"].build()) for name in ("query", "document")}
        self.sub_modules = nn.ModuleDict(towers)


def test_a_router_of_whole_models_is_none_of_experts():
    plan = route(nn.Sequential(Router()))
    towers = route(ZOO["bert"].build())
    assert len(plan.muon) == 2 * len(towers.muon)
    assert not any(r.kind == "router" for r in plan.routes)


class Gated(nn.Module):
    def __init__(self, rows: int, cols: int, experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(cols, rows, bias=False)
        if experts is not None:
            self.experts = experts


def configured(gated: nn.Module) -> nn.Module:
    gated.config = SimpleNamespace(moe_num_experts=8, num_experts_per_tok=2)
    return gated


GATES = {
    "square": (lambda: Gated(32, 32), "linear"),  # D-FINE's
    "halved": (lambda: Gated(16, 32), "linear"),
    "few rows": (lambda: Gated(4, 32), "router"),
    "a row per expert": (lambda: Gated(3, 8, nn.ModuleList(Mlp() for _ in range(3))), "router"),
    "others": (lambda: Gated(2, 8, nn.ModuleList(Mlp() for _ in range(3))), "linear"),
    "as configured": (lambda: configured(Gated(8, 8)), "router"),
    "not as configured": (lambda: configured(Gated(2, 32)), "linear"),
}


@pytest.mark.parametrize("case", GATES)
def test_a_gate_is_a_router_if_it_has_a_row_per_expert(case):
    build, kind = GATES[case]
    found = {r.name: r.kind for r in route(nn.Sequential(build())).routes}
    assert found["0.gate.weight"] == kind


# --- what has no matrix -------------------------------------------------------------------------


def test_lazy_modules_are_refused_by_name():
    with pytest.raises(ValueError, match=r"1\.weight belongs to a lazy module.*Run one batch"):
        route(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)))


class Named(nn.Module):
    """Hidden layers under names, and in numbers, that outputs usually have."""

    def __init__(self, last):
        super().__init__()
        self.wpe = nn.Embedding(WIDTH, WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleDict({"query": nn.Linear(WIDTH, WIDTH), "out": nn.Linear(WIDTH, 24)})
        self.blocks = nn.ModuleList([Block()])
        self.add_module(last, nn.Linear(WIDTH, 5))


@pytest.mark.parametrize("last", ["head", "pi"])
def test_hidden_layers_with_names_of_heads_go_to_muon(last, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_muon"):
        plan = route(Named(last))
        plan.param_groups(MuonConfig(lr=0.1))
    routes = {one.name: one for one in plan.routes}
    for name in ("fc", "heads.query", "heads.out"):
        assert routes[f"{name}.weight"].algorithm == "muon", name
    assert routes[f"{last}.weight"].algorithm == ("adamw" if last == "head" else "muon")
    assert ("head" in caplog.text) is (last == "pi")
