"""Hybrid Newton-Schulz: the nearest semi-orthogonal matrix, by matrix products alone.

Source: R Algorithm 1 (spec 5.2). X is the batch of matrices, R their rows, C their columns.

Same bits in any batch: a product's bits may change with the alignment and strides of its operands and with the sizes
by which the library chooses its loops. Every matrix is therefore copied into zeros whose rows and columns are multiples
of ALIGNMENT, so that each begins on a 64-byte border; padding stays zero, and zeros add nothing to the rest. In fp64
the library also splits the sums of small products among threads, but not inside a batch: fp64 matrices are multiplied
one by one. Without either, 6 of 29 shapes had other fp64 bits in a batch of two than alone (MKL 2024.2, AVX2).
"""

import torch
from torch import Tensor

from optim.iterations import COEFFICIENTS

ALIGNMENT = 16
"""Elements: 64 bytes in fp32, 128 in fp64."""


def orthogonalize(y_XRC: Tensor) -> Tensor:
    """Replace every matrix Y = U S V^T of the batch by U V^T, approximately.

    Source: R Algorithm 1.
    Math: X = Y / |Y|_F, then ten times X <- a X + b (X X^T) X + c (X X^T)^2 X; in fp32 singular values end within
        [0.99, 1.01] for condition numbers up to 1000. Tall matrices are transposed first: X X^T is the smaller square.
    Shapes: [X, R, C], any float type; the result has the same shape, in at least fp32.
    Compute: in at least fp32; fp64 stays fp64.
    Guard: a matrix of zeros gives zeros. A matrix is divided by its largest element before its norm is taken: squares
        below 1e-45 vanish in fp32, and the momentum of an expert without tokens gets there within a thousand steps.
    """
    rows, columns = y_XRC.shape[1:]
    tall = rows > columns
    x_XRC = _normalized(y_XRC.mT if tall else y_XRC)
    if x_XRC.dtype == torch.float64:
        o_XRC = torch.cat([_iterate(x_1RC) for x_1RC in x_XRC.split(1)])
    else:
        o_XRC = _iterate(x_XRC)
    return (o_XRC.mT if tall else o_XRC)[:, :rows, :columns]


def _normalized(y_XRC: Tensor) -> Tensor:
    """Padded copies with a Frobenius norm of 1, or 0, in at least fp32."""
    count, rows, columns = y_XRC.shape
    dtype = torch.promote_types(y_XRC.dtype, torch.float32)
    x_XRC = torch.zeros(count, _padded(rows), _padded(columns), dtype=dtype, device=y_XRC.device)
    x_XRC[:, :rows, :columns] = y_XRC
    _divide(x_XRC, x_XRC.abs().amax(dim=(1, 2), keepdim=True))
    # Two sums: a single sum over rows and columns is split among threads when the batch is one matrix.
    _divide(x_XRC, x_XRC.square().sum(dim=2, keepdim=True).sum(dim=1, keepdim=True).sqrt_())
    return x_XRC


def _divide(x_XRC: Tensor, divisor_X11: Tensor) -> None:
    x_XRC.div_(divisor_X11.masked_fill_(divisor_X11 == 0, 1))


def _padded(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _iterate(x_XRC: Tensor) -> Tensor:
    gram_XRR = x_XRC.new_empty(x_XRC.shape[0], x_XRC.shape[1], x_XRC.shape[1])
    factor_XRR = torch.empty_like(gram_XRR)
    next_XRC = torch.empty_like(x_XRC)
    for a, b, c in COEFFICIENTS:
        torch.bmm(x_XRC, x_XRC.mT, out=gram_XRR)
        torch.baddbmm(gram_XRR, gram_XRR, gram_XRR, beta=b, alpha=c, out=factor_XRR)
        torch.baddbmm(x_XRC, factor_XRR, x_XRC, beta=a, out=next_XRC)
        x_XRC, next_XRC = next_XRC, x_XRC
    return x_XRC
