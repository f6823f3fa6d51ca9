"""Matrix products, which are nearly all of the work, and what computes them.

In: a name (``auto``, ``torch``, …), a device and a dtype. Out: :class:`Products`, the functions
with which an iteration multiplies matrices and takes norms.
"""

from .choice import KERNELS, check_kernel, products_for
from .halves import HALVES
from .products import TORCH, Products

__all__ = ["HALVES", "KERNELS", "TORCH", "Products", "check_kernel", "products_for"]
