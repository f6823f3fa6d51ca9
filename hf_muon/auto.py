"""``import hf_muon.auto`` makes ``optim="muon"`` a valid name."""

from hf_muon.integrations.transformers import register

register()
