"""Newton-Schulz gives the orthogonal factor of every matrix, and each matrix's bits do not depend on its batch."""

import pytest
import torch

from optim.iterations import COEFFICIENTS
from optim.newton_schulz import orthogonalize
from tests.oracles.muon import hybrid_newton_schulz, polar_factor

SHAPES = [(1, 1), (1, 7), (7, 1), (4, 512), (16, 64), (24, 512), (33, 65), (64, 16), (127, 31), (128, 128)]


def matrices(count: int, rows: int, columns: int, condition: float = 10.0) -> torch.Tensor:
    """Random matrices whose singular values spread from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    u, _, v = torch.linalg.svd(
        torch.randn(count, rows, columns, generator=generator, dtype=torch.float64), full_matrices=False
    )
    spread = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), min(rows, columns), dtype=torch.float64)
    return (u * spread) @ v


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("condition", [1.0, 30.0, 1000.0])
def test_singular_values_are_one(rows: int, columns: int, condition: float) -> None:
    result = orthogonalize(matrices(2, rows, columns, condition).float())
    values = torch.linalg.svdvals(result.double())
    # The specification measured [1.0000, 1.002] in fp32 for condition numbers up to 1000; 0.01 leaves room for shapes.
    assert (values - 1).abs().max() < 0.01


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_agrees_with_the_oracle_and_the_polar_factor(rows: int, columns: int) -> None:
    batch = matrices(3, rows, columns)
    result = orthogonalize(batch)
    for matrix, ours in zip(batch, result, strict=True):
        # fp64 against fp64: ten iterations of three products leave some hundred roundings.
        assert torch.allclose(ours, hybrid_newton_schulz(matrix), atol=1e-10)
        assert (ours - polar_factor(matrix)).abs().max() < 0.01
    assert result.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (3, 5), (13, 17), (17, 13), (31, 65), (16, 512), (33, 100)])
def test_bits_do_not_depend_on_the_batch(rows: int, columns: int, dtype: torch.dtype) -> None:
    """In batches of any size, from any place of a larger tensor, and from transposed storage."""
    batch = matrices(7, rows, columns).to(dtype)
    alone = torch.cat([orthogonalize(batch[i : i + 1]) for i in range(7)])
    for size in (2, 3, 7):
        for first in (0, 1):
            assert torch.equal(torch.cat([orthogonalize(part) for part in batch[first:].split(size)]), alone[first:])
    assert torch.equal(orthogonalize(batch.mT.contiguous().mT), alone)


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e25, 3e37])
def test_size_does_not_matter(size: float) -> None:
    """Squares of 1e-25 and 1e25 leave fp32's range. A scaled input is rounded once more: 6e-8, some hundredfold."""
    batch = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(batch * size), orthogonalize(batch), rtol=0, atol=1e-5)


def test_zero_stays_zero_and_low_precision_is_promoted() -> None:
    result = orthogonalize(torch.zeros(2, 3, 5, dtype=torch.bfloat16))
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.zeros(2, 3, 5))


def test_steps_are_eight_fast_and_two_exact() -> None:
    assert COEFFICIENTS == ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
