"""Polar factors of matrices: (…, m, n) in, (…, m, n) out. Needs only torch.

``polar_factor`` is for users and keeps the dtype of its input; ``orthogonalize`` is for the
optimizer and returns the compute dtype.
"""

from . import devices
from .coefficients import FAMILIES, check_steps, register_coefficients
from .factor import METHODS, cheapest_iteration, orthogonalize, polar_factor
from .kernels import check_kernel, products_for
from .outliers import Watch
from .precision import COMPUTE_DTYPES, compute_dtype, in_own_dtype
from .together import alike, apply_together, batched, batched_alike
from .workspace import Workspace

__all__ = [
    "COMPUTE_DTYPES",
    "FAMILIES",
    "METHODS",
    "Watch",
    "Workspace",
    "alike",
    "apply_together",
    "batched",
    "batched_alike",
    "cheapest_iteration",
    "check_kernel",
    "check_steps",
    "compute_dtype",
    "devices",
    "in_own_dtype",
    "orthogonalize",
    "polar_factor",
    "products_for",
    "register_coefficients",
]
