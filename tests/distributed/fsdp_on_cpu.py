"""For tests only: let accelerate use FSDP2 on CPUs.

accelerate (1.15) takes its FSDP branch on accelerators alone and turns FSDP into DDP on a CPU
without a word. Import this before an Accelerator is made.
"""

import os

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

_original = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = _with_fsdp
