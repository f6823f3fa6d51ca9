"""Importing this module makes ``optim="muon"`` a valid name: ``import hf_muon.auto``."""

from hf_muon.integrations.transformers import register

register()
