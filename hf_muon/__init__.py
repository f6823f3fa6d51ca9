"""Muon for the Hugging Face Trainer: ``optim="muon"``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_muon import diagnostics
from hf_muon.config import MuonConfig
from hf_muon.integrations.factory import MuonOptimizerFactory, create_muon_optimizer
from hf_muon.integrations.transformers import register
from hf_muon.optimizer import Muon
from hf_muon.polar import polar_factor
from hf_muon.routing import Route, RoutePlan, route

if TYPE_CHECKING:
    from hf_muon.diagnostics.monitor import SpectralMonitor
    from hf_muon.integrations.qk_clip import QKClip
    from hf_muon.integrations.robust import RobustAggregation

__all__ = [
    "Muon",
    "MuonConfig",
    "MuonOptimizerFactory",
    "QKClip",
    "RobustAggregation",
    "Route",
    "RoutePlan",
    "SpectralMonitor",
    "create_muon_optimizer",
    "diagnostics",
    "polar_factor",
    "register",
    "route",
]


_LATE = {  # these need transformers, which takes seconds to import
    "QKClip": "hf_muon.integrations.qk_clip",
    "RobustAggregation": "hf_muon.integrations.robust",
    "SpectralMonitor": "hf_muon.diagnostics.monitor",
}


def __getattr__(name: str) -> Any:
    """Import these on first use."""
    if name not in _LATE:
        raise AttributeError(f"module 'hf_muon' has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
