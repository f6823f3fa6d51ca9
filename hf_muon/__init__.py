"""Muon for the Hugging Face Trainer: ``optim="muon"``."""

from hf_muon import diagnostics
from hf_muon.config import MuonConfig
from hf_muon.integrations.factory import MuonOptimizerFactory, create_muon_optimizer
from hf_muon.integrations.transformers import register
from hf_muon.optimizer import Muon
from hf_muon.polar import polar_factor
from hf_muon.routing import Route, RoutePlan, route

__all__ = [
    "Muon",
    "MuonConfig",
    "MuonOptimizerFactory",
    "Route",
    "RoutePlan",
    "create_muon_optimizer",
    "diagnostics",
    "polar_factor",
    "register",
    "route",
]
