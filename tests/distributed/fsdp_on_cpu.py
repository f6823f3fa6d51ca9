"""For tests only: let accelerate use FSDP2 on CPUs.

accelerate (1.15) takes its FSDP branch on accelerators alone and turns FSDP into DDP on a CPU
without a word. Import this before an Accelerator is made.
"""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

_original = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        # As accelerate does: every later AcceleratorState() copies the type from here.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            # Pinned memory is an accelerator's; without one, torch (2.13) refuses to pin.
            fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)


AcceleratorState.__init__ = _with_fsdp
