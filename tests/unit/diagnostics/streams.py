"""Averages of streams, for the tests: one pass over a stream serves several windows."""

from __future__ import annotations

import torch


def momentum_of(window):
    return 1 - 1 / window


def last_averages(stream, windows):
    """The EMA of each window after the last step, the last gradient and the last signal."""
    buffers = {}
    for step in stream:
        for window in windows:
            buffer = buffers.setdefault(window, torch.zeros_like(step.gradient))
            buffer.lerp_(step.gradient, 1 - momentum_of(window))
    return buffers, step
