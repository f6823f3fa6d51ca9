"""One optimizer step on matrices, and AdamW for everything else."""

from hf_muon.optimizer.importer import import_state
from hf_muon.optimizer.muon import Muon

__all__ = ["Muon", "import_state"]
