"""Compile the product for an architecture without a device; run by test_triton_products.py.

Prints, as JSON, by the kind of product: how many instructions of tensor cores it has, whether its
shared memory fits, and the resources that it takes, as cuobjdump tells them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_muon.polar.kernels.triton_kernels import product
from hf_muon.polar.kernels.triton_products import blocks_for

SHARED = {80: 163 * 1024, 90: 227 * 1024}
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# sizes (m, n, k), dtype, symmetric, with C, B transposed
KINDS = [
    ((1024, 1024, 4096), torch.bfloat16, True, False, True),  # XXᵀ
    ((1024, 1024, 1024), torch.bfloat16, True, True, False),  # bA + cA²
    ((1024, 4096, 1024), torch.bfloat16, False, True, False),  # aX + BX
    ((256, 256, 1024), torch.bfloat16, True, False, True),
    ((1021, 1021, 1023), torch.bfloat16, True, True, False),
    ((1024, 1024, 4096), torch.float32, True, True, False),
]


def compiled(architecture, sizes, dtype, symmetric, has_c, transposed):
    blocks = blocks_for(sizes, dtype, symmetric, SHARED[architecture])
    aligned = not any(size % 16 for size in sizes)
    fixed = {
        "HAS_C": has_c, "SYMMETRIC": symmetric, "EVEN_K": sizes[2] % blocks.depth == 0,
        "UPCAST": False, "GROUP": 8, "BM": blocks.rows, "BN": blocks.cols, "BK": blocks.depth,
        **dict.fromkeys(("ak", "cn", "dn", "bk" if transposed else "bn"), 1),
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for number, name in enumerate(product.arg_names):
        if name in fixed:
            signature[name], constants[number,] = "constexpr", fixed[name]
        elif name in ("alpha", "beta"):
            signature[name] = "fp32"
        else:
            signature[name] = NAMES[dtype] if name in "ABCD" else "i32"
            if name in "ABCD" or (aligned and name != "tiles"):
                attributes[number,] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(product, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True
        },
    )  # fmt: skip


def main(architecture, folder):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binary = Path(folder) / "kernel.cubin"
    found = {}
    for kind in KINDS:
        kernel = compiled(int(architecture), *kind)
        binary.write_bytes(kernel.asm["cubin"])
        command = [tool, "--dump-resource-usage", binary]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        count = len(re.findall(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"]))
        fits = kernel.metadata.shared <= SHARED[int(architecture)]
        found[" ".join(map(str, kind))] = count, fits, re.search("REG:.*", told).group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
