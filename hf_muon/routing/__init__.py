"""Routing: which parameter goes to Muon, as which matrices, and why."""

from hf_muon.routing.plan import Route, RoutePlan, route

__all__ = ["Route", "RoutePlan", "route"]
