"""Steps of the optimizer on fake CUDA tensors, counted; run as a program of its own.

    python -m tests.unit.gpu.fake_cuda guard.so < cases.json > found.json

A CPU build of torch has no device guards for CUDA and MPS, which it asks for when a tensor there is
indexed. The library registers some that do nothing, for the whole process: hence the program.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.utils.cpp_extension
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hf_muon import Muon
from hf_muon.commands.counted import counting
from hf_muon.optimizer.plans import Plans
from hf_muon.polar import precision
from hf_muon.rules import register_filter
from scripts.scaling_table import MODELS

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
using NoGuardForCUDA = NoOpDeviceGuardImpl<DeviceType::CUDA>;
using NoGuardForMPS = NoOpDeviceGuardImpl<DeviceType::MPS>;
C10_REGISTER_GUARD_IMPL(CUDA, NoGuardForCUDA);
C10_REGISTER_GUARD_IMPL(MPS, NoGuardForMPS);
}
"""


def compiled_guard(folder: Path) -> Path:
    """The library with the guard."""
    source, library = folder / "guard.cpp", folder / "libguard.so"
    source.write_text(GUARD)
    where = torch.utils.cpp_extension
    command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(library)]
    command += [f"-I{path}" for path in where.include_paths()]
    command += [f"-L{path}" for path in where.library_paths()]
    subprocess.run([*command, "-lc10"], check=True, timeout=120)
    return library


@contextlib.contextmanager
def fake_cuda():
    """Tensors on "cuda" and "mps" are fake; the first is a device that has bfloat16.

    Plans follow from shapes; the index arithmetic that makes them is real, on the CPU.
    """
    planned, native = Plans.of, precision.has_native_bfloat16

    def of(*arguments):
        with _disable_current_modes():
            return planned(*arguments)

    def has_native_bfloat16(kind, index=None):
        return kind == "cuda" or native(kind, index)

    with (
        mock.patch.object(Plans, "of", of),
        mock.patch.object(precision, "has_native_bfloat16", has_native_bfloat16),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def shapes_of(name, layers=None):
    """The hidden matrices of a LLaMA, or pairs of LoRA factors for them: ``lora 130M``."""
    kind, _, model = name.rpartition(" ")
    llama = MODELS[model]
    if layers is not None:
        llama = llama._replace(layers=layers)
    shapes = [parameter.shape for parameter in llama.parameters()]
    if kind == "lora":
        return [shape for m, n in shapes for shape in ((8, n), (m, 8))]
    return shapes


def built(case):
    """Parameters on the device with gradients, and the optimizer."""
    dtype, device = getattr(torch, case.get("dtype", "float32")), case.get("device", "cuda")
    shapes = case.get("shapes") or shapes_of(case["model"], case.get("layers"))
    others = case.get("others", [])
    params, rest = (
        [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) for shape in of]
        for of in (shapes, others)
    )
    for one in (*params, *rest):
        one.grad = torch.empty_like(one)
    if case.get("optimizer") == "torch":
        return torch.optim.Muon(params, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    settings = dict(case.get("settings", {}))
    group = {"params": params}
    if settings.get("lora_update", "factor") != "factor":
        names = [f"m{i}.lora_{'AB'[j]}.weight" for i in range(len(params) // 2) for j in (0, 1)]
        group |= {
            "params": list(zip(names, params, strict=True)),
            "pairs": [names[i ^ 1] for i in range(len(names))],
            "factors": ["A", "B"] * (len(params) // 2),
            "scalings": [2.0] * len(params),
        }
    groups = [group] + [{"params": rest, "algorithm": "adamw"}] * bool(rest)
    with _disable_current_modes():  # what is registered is tried with real numbers
        return Muon(groups, lr=1e-3, **settings)


class Watching(TorchDispatchMode):
    """Sees the settings under which products in float32 run, and what is made in float64."""

    def __init__(self):
        super().__init__()
        self.precisions, self.autocast, self.in_float64 = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            self.precisions.add(torch.backends.cuda.matmul.fp32_precision)
            self.autocast.add(torch.is_autocast_enabled("cuda"))
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, list | tuple) else [result]
        for one in made:
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64 and not one.is_cpu:
                self.in_float64.add(name)
        return result


def found_in(case):
    """What a step asks of the device, and where everything is."""
    optimizer, device = built(case), case.get("device", "cuda")
    with counting(device) as first:
        optimizer.step()
    watching = Watching()
    with counting(device) as counts, watching:
        optimizer.step()
    places = {
        f"{name} of {group.get('algorithm')}": value.device.type
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name, value in optimizer.state[parameter].items()
    }
    return {
        **{name: value for name, value in vars(counts).items() if name != "work"},
        "first_waits": first.waits,
        "flop": counts.flop,
        "nbytes": counts.nbytes,
        "places": places,
        "precisions": sorted(watching.precisions),
        "autocast": sorted(watching.autocast),
        "in_float64": sorted(watching.in_float64),
    }


def reads_a_value(x, buffers, given):
    """A filter as it should not be."""
    return [one * float(one.abs().max()) for one in x]


def mixes_devices(x, buffers, given):
    """A filter that would fail on a device."""
    return [one + torch.ones(one.shape, device="cpu") for one in x]


def main():
    """Answer the cases of standard input."""
    ctypes.CDLL(sys.argv[1])
    register_filter("reads_a_value", reads_a_value, buffers=())
    register_filter("mixes_devices", mixes_devices, buffers=())
    found = {}
    for name, case in json.load(sys.stdin).items():
        if case.get("tf32"):
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.set_autocast_enabled("cuda", True)
        with fake_cuda():
            try:
                found[name] = found_in(case)
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
        if case.get("tf32"):
            now = (torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cuda"))
            found[name]["afterwards"] = now
            torch.backends.cuda.matmul.fp32_precision = "none"
            torch.set_autocast_enabled("cuda", False)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
