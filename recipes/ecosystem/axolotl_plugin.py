"""A plugin of axolotl that makes ``optimizer: hf_muon`` a valid name.

In: ``plugins: [axolotl_plugin.HfMuonPlugin]`` in axolotl's configuration, and this folder on
``PYTHONPATH``. Out: the name, registered in every process before axolotl makes the Trainer's
arguments; configurations under which axolotl would build another optimizer are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin

import hf_muon

# With any of these, axolotl (0.19) builds its own parameter groups, which ignore the routes.
GROUPS_OF_AXOLOTL = ("embedding_lr", "embedding_lr_scale", "loraplus_lr_ratio", "lr_groups")


class HfMuonPlugin(BasePlugin):
    """Registers hf_muon's optimizer names."""

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Register the names; axolotl calls this when it has read the configuration.

        Raises:
            ValueError: ``optimizer`` is axolotl's own Muon, or a setting bypasses the routes.
        """
        hf_muon.register()
        if cfg.get("optimizer") == "muon":
            raise ValueError(
                "optimizer: muon is axolotl's own Muon; hf_muon's is called hf_muon there. Set "
                "optimizer: hf_muon, or leave the plugin out."
            )
        taken = [name for name in GROUPS_OF_AXOLOTL if cfg.get(name) is not None]
        if cfg.get("optimizer") == "hf_muon" and taken:
            raise ValueError(
                f"{', '.join(taken)} would have axolotl make the parameter groups. Leave it out; "
                "optim_args has adamw_lr for the embeddings, and lora_update for adapters."
            )
