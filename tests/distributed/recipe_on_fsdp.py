"""Run the LLaMA recipe under FSDP2 on CPUs: the arguments are those of its run.py.

Fails unless every parameter of the optimizer is a DTensor, and writes ``layout.json`` to the output
folder: the mesh and the placements, which have to be the same for all of them.
"""

import json
import runpy
import sys
from pathlib import Path

import transformers.trainer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import tests.distributed.fsdp_on_cpu  # noqa: F401
from hf_muon.integrations.report import find_muon

RECIPE = Path(__file__).parents[2] / "recipes" / "llama_pretrain"


class WriteLayout(TrainerCallback):
    def on_train_end(self, args, state, control, optimizer=None, **_):
        params = [p for group in find_muon(optimizer).param_groups for p in group["params"]]
        assert all(isinstance(p, DTensor) for p in params)
        (layout,) = {(tuple(p.device_mesh.shape), str(p.placements)) for p in params}
        if state.is_world_process_zero:
            mesh, placements = layout
            content = {"mesh": mesh, "placements": placements, "parameters": len(params)}
            (Path(args.output_dir) / "layout.json").write_text(json.dumps(content))


if __name__ == "__main__":
    transformers.trainer.DEFAULT_CALLBACKS.append(WriteLayout)
    sys.path.insert(0, str(RECIPE))
    runpy.run_path(str(RECIPE / "run.py"), run_name="__main__")
