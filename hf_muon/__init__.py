"""Muon for the Hugging Face Trainer: ``optim="muon"``."""

from hf_muon.config import MuonConfig

__all__ = ["MuonConfig"]
