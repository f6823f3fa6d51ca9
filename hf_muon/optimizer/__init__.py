"""The optimizer: Muon for hidden matrices, and AdamW for everything else."""

# ruff: noqa: F401  (importing these modules registers the entries of update rules)
from hf_muon.optimizer import auto_momentum, maps, momentum, pair_maps, prefilters, rescales, writes
from hf_muon.optimizer.importer import import_state
from hf_muon.optimizer.muon import Muon

__all__ = ["Muon", "import_state"]
