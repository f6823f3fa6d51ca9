"""Routing: which parameter goes to Muon, as which matrices, and why."""

from hf_muon.routing.plan import RoutePlan, route
from hf_muon.routing.route import Route

__all__ = ["Route", "RoutePlan", "route"]
