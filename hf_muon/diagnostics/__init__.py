"""Tools to study spectra: metrics, streams with known signal, replay of orders, model probes."""

from hf_muon.diagnostics.metrics import (
    direction_alignment,
    effective_rank,
    filtering_ratio,
    noise_suppression,
    nuclear_rank,
    orthogonality_error,
    principal_angles,
    signal_alignment,
    spectral_entropy,
    spectral_gap,
    stable_rank,
)
from hf_muon.diagnostics.probes import TrajectoryProbe, stationary_probe
from hf_muon.diagnostics.replay import replay
from hf_muon.diagnostics.synthetic import matrix_sensing, spiked_stream

__all__ = [
    "TrajectoryProbe",
    "direction_alignment",
    "effective_rank",
    "filtering_ratio",
    "matrix_sensing",
    "noise_suppression",
    "nuclear_rank",
    "orthogonality_error",
    "principal_angles",
    "replay",
    "signal_alignment",
    "spectral_entropy",
    "spectral_gap",
    "spiked_stream",
    "stable_rank",
    "stationary_probe",
]
