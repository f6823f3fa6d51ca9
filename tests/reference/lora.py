"""Updates of adapter pairs in float64, from the whole matrices: the oracles of the fast ones.

In: A (r, n), B (m, r) and the gradient G (m, n) of the base weight W + c·BA. Out: new (A, B).
Projectors, roots and polar factors are those of m × n or r × r matrices, by their definitions.
"""

import math

import torch

from tests.reference.muon import exact_polar


def factor_gradients(A, B, G, c=1.0):
    """What backpropagation gives for the factors of W + c·BA."""
    return c * B.T @ G, c * G @ A.T


def damped(S, damping, relative=True):
    """S + δ·(tr S/r)·I, or S + δ·I."""
    mean = S.trace() / len(S) if relative else 1.0
    return S + damping * mean * torch.eye(len(S), dtype=S.dtype)


def power(S, exponent):
    """A power of a symmetric matrix; zero for zero."""
    if not S.any():
        return S.clone()
    values, vectors = torch.linalg.eigh(S)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def projector(X, damping):
    """X(XᵀX)⁻¹Xᵀ onto the columns of X, with the inverse damped."""
    return X @ power(damped(X.T @ X, damping), -1.0) @ X.T


def decayed(W, dW, decay):
    """Split decay: sW + dW/s."""
    s = math.sqrt(1 - decay)
    return s * W + dW / s


def product(A, B, M_A, M_B, *, step, decay=0.0, damping=0.0, relative=True):
    """LoRA-Muon (arXiv 2606.12921), from the gradients of the factors."""
    A, B, M_A, M_B = A.double(), B.double(), M_A.double(), M_B.double()
    if not (A.any() and B.any()):
        decay = 0.0
    root_a = power(damped(A @ A.T, damping, relative), -0.5)
    root_b = power(damped(B.T @ B, damping, relative), -0.5)
    dA = -step / 2 * root_b @ exact_polar(root_b @ M_A)
    dB = -step / 2 * exact_polar(M_B @ root_a) @ root_a
    return decayed(A, dA, decay), decayed(B, dB, decay)


def tangent_step(A, B, G, *, damping=0.0, iterations=3):
    """X = P(O(…P(O(P(G))))), by which LoRA-TSD (arXiv 2609.02734) moves BA, and its last O(…)."""
    P_A, P_B = projector(A.double().T, damping), projector(B.double(), damping)

    def onto_tangent_space(X):
        return P_B @ X + X @ P_A - P_B @ X @ P_A

    X = onto_tangent_space(G.double())
    for _ in range(iterations):
        factor = exact_polar(X)
        X = onto_tangent_space(factor)
    return X, factor


def tangent(A, B, G, *, step, decay=0.0, damping=0.0, iterations=3):
    """LoRA-TSD, from the gradient of the product."""
    A, B = A.double(), B.double()
    if not (A.any() and B.any()):
        decay = 0.0
    _, factor = tangent_step(A, B, G, damping=damping, iterations=iterations)
    beside = factor - factor @ projector(A.T, damping)
    dB = factor @ A.T @ power(damped(A @ A.T, damping), -1.0)
    dA = power(damped(B.T @ B, damping), -1.0) @ B.T @ beside
    return decayed(A, -step * dA, decay), decayed(B, -step * dB, decay)
