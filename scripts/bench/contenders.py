"""Every published Muon that installs from the package index, each with its best setting.

In: matrices. Out: optimizers that train them at the same learning rate, decay and momentum. If a
setting changes only speed, each value is a variant, and peers.py keeps the fastest; if one value
has a smaller error at the same cost, that value is used. Packages that fail to import say why.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from hf_muon import Muon

LR, DECAY, MOMENTUM = 1e-3, 0.1, 0.95

Matrices = list[nn.Parameter]
Make = Callable[[Matrices], torch.optim.Optimizer]


def hf_muon(matrices: Matrices, **settings: Any) -> torch.optim.Optimizer:
    """This package."""
    return Muon(matrices, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, **settings)


def torchs(matrices: Matrices) -> torch.optim.Optimizer:
    """torch.optim.Muon, which has the quintic and a loop over matrices."""
    return torch.optim.Muon(
        matrices, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )


def deepspeeds(matrices: Matrices, ns_method: str) -> torch.optim.Optimizer:
    """DeepSpeed's, the variant for one process, which compiles itself."""
    module = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    return module.SingleDeviceMuon(
        matrices, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, ns_method=ns_method
    )


def timms(matrices: Matrices, coefficients: str) -> torch.optim.Optimizer:
    """timm's; only this optimizer, because its other modules need torchvision."""
    folder = _folder("timm")
    for name, path in (("timm", folder), ("timm.optim", folder / "optim")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
    module = importlib.import_module("timm.optim.muon")
    groups = [{"params": matrices, "use_muon": True}]  # else LoRA's A and B go to AdamW
    return module.Muon(
        groups, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, nesterov=True,
        ns_coefficients=coefficients,
    )  # fmt: skip


def pytorch_optimizers(matrices: Matrices, **settings: Any) -> torch.optim.Optimizer:
    """pytorch_optimizer's."""
    module = importlib.import_module("pytorch_optimizer")
    groups = [{"params": matrices, "use_muon": True}]
    return module.Muon(
        groups, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, use_adjusted_lr=True, **settings
    )


def heavyballs(matrices: Matrices, compile_mode: str | None) -> torch.optim.Optimizer:
    """heavyball's, with its own coefficients.

    Its compile mode is global and read at every call, so each optimizer sets its own before a step.
    """
    utils = importlib.import_module("heavyball.utils")
    module = importlib.import_module("heavyball")
    optimizer = module.Muon(matrices, lr=LR, weight_decay=DECAY, betas=(MOMENTUM, 0.99))
    own_step = optimizer.step

    def step() -> None:
        utils.compile_mode = compile_mode
        own_step()

    optimizer.step = step
    return optimizer


def muon_fsdp2s(matrices: Matrices) -> torch.optim.Optimizer:
    """muon-fsdp2's, which compiles its iteration itself."""
    module = importlib.import_module("muon_fsdp2")
    return module.Muon(
        [{"params": matrices, "use_muon": True, "lr": LR, "weight_decay": DECAY,
          "momentum": MOMENTUM}]
    )  # fmt: skip


def dtensor_muons(matrices: Matrices, package: str) -> torch.optim.Optimizer:
    """dtensor-muon's and muonium's, with their iteration that needs no CUDA kernels.

    Their optimizers always select the one with CUDA kernels, which does not run on a CPU.
    """
    with _without_triton():
        module = importlib.import_module(package)
    library = importlib.import_module(f"{package}.orthogonalize.orthogonalize")
    choose = library._get_orthogonalization_fn
    if not isinstance(choose, partial):

        def plain(strategy: str, use_triton: bool, choose: Any = choose) -> Any:
            return choose(strategy, False)

        library._get_orthogonalization_fn = partial(plain)
    return module.Muon(
        matrices, lr=LR, wd=DECAY, momentum=MOMENTUM, use_cautious_wd=False,
        orthogonalization_strategy="polar_express",
    )  # fmt: skip


def _folder(package: str) -> Path:
    for entry in sys.path:
        if (Path(entry) / package).is_dir():
            return Path(entry) / package
    raise ModuleNotFoundError(f"No module named {package!r}")


@contextmanager
def _without_triton() -> Iterator[None]:
    """Make modules with Triton kernels importable if Triton is not installed."""
    importlib.import_module("torch._inductor.utils")  # it imports Triton, too
    names = [] if importlib.util.find_spec("triton") else ["triton", "triton.language"]
    sys.modules.update({name: mock.MagicMock() for name in names})
    try:
        yield
    finally:
        for name in names:  # else torch.compile would take it for the real one
            del sys.modules[name]


CONTENDERS: dict[str, dict[str, Make]] = {
    "hf_muon": {"defaults": hf_muon},
    "hf_muon, four tight steps": {"": partial(hf_muon, polar_steps=4)},
    "hf_muon, five steps of polar_express": {"": partial(hf_muon, coefficients="polar_express")},
    "hf_muon, six tight steps": {"": partial(hf_muon, polar_steps=6)},
    "torch": {"": torchs},
    "deepspeed": {name: partial(deepspeeds, ns_method=name) for name in ("standard", "gram")},
    "timm": {"polar_express": partial(timms, coefficients="polar_express")},
    "pytorch_optimizer": {
        # Its ns_method="gram_newton_schulz" takes 80 times as long on a CPU.
        f"polar_express, foreach={foreach}": partial(
            pytorch_optimizers, ns_coeffs="polar_express", foreach=foreach
        )
        for foreach in (False, True)
    },
    "heavyball": {
        "eager": partial(heavyballs, compile_mode=None),
        "compiled": partial(heavyballs, compile_mode="default"),
    },
    "muon-fsdp2": {"": muon_fsdp2s},
    "dtensor-muon": {"polar_express": partial(dtensor_muons, package="dtensor_muon")},
    "muonium": {"polar_express": partial(dtensor_muons, package="muonium")},
}
