"""The iterations of hybrid Newton-Schulz as numbers, and what they cost (R Algorithm 1, spec 5.2); without torch."""

FAST = (3.4445, -4.7750, 2.0315)
"""Coefficients (a, b, c) of the first eight iterations: small singular values grow fast, none settles."""
EXACT = (2.0, -1.5, 0.5)
"""Coefficients of the last two: singular values near 1 converge to 1."""
COEFFICIENTS = (FAST,) * 8 + (EXACT,) * 2
BATCH_ELEMENTS = 1 << 17
"""Elements that are orthogonalised at a time: their copies stay in a core's cache, and threads have parts to share."""


def iterations_flop(*sides: int) -> int:
    """FLOP of all iterations on one matrix, R its smaller side: X X^T, its square, and the product of the two."""
    R, C = sorted(sides)
    return len(COEFFICIENTS) * 2 * (R * R * C + R**3 + R * R * C)
