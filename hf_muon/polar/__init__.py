"""Polar factors of matrices: (…, m, n) in, (…, m, n) out, and nothing else.

``polar_factor`` is for users and keeps the dtype; ``orthogonalize`` is for the optimizer and
returns the compute dtype. Needs torch alone.
"""

from .coefficients import COEFFICIENTS
from .factor import METHODS, cheapest_iteration, orthogonalize, polar_factor
from .precision import COMPUTE_DTYPES, compute_dtype
from .workspace import Workspace

__all__ = [
    "COEFFICIENTS",
    "COMPUTE_DTYPES",
    "METHODS",
    "Workspace",
    "cheapest_iteration",
    "compute_dtype",
    "orthogonalize",
    "polar_factor",
]
