"""Hybrid Newton-Schulz: the nearest (semi-)orthogonal matrix of a batch of matrices (R Algorithm 1; spec 5.2)."""

import torch
from torch import Tensor

FAST = (3.4445, -4.7750, 2.0315)
"""Coefficients of steps 1-8: quick growth of small singular values."""
EXACT = (2.0, -1.5, 0.5)
"""Coefficients of steps 9-10: convergence to 1."""
COEFFICIENTS = (FAST,) * 8 + (EXACT,) * 2


def orthogonalize(y_XRC: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T of a batch [X, R, C], singular values within [0.99, 1.01] of 1; zero stays zero.

    Math: X = Y / ||Y||_F, then ten times X <- a X + b (X X^T) X + c (X X^T)^2 X. Tall matrices are transposed first, so
    that X X^T is the smaller of the two squares. Compute: in at least fp32. A matrix's result has the same bits in a
    batch of any size, because every product is one batched product of the same shape per matrix.
    """
    tall = y_XRC.shape[-2] > y_XRC.shape[-1]
    x = y_XRC.to(torch.promote_types(y_XRC.dtype, torch.float32))
    x = x.transpose(-2, -1).contiguous() if tall else x
    norm_X11 = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm_X11.clamp_min(torch.finfo(x.dtype).tiny)
    for a, b, c in COEFFICIENTS:
        square = torch.bmm(x, x.transpose(-2, -1))
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.transpose(-2, -1) if tall else x
