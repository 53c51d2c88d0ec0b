"""Proves that the benchmarks for a GPU run from end to end, on a CPU with tiny sizes and interpreted kernels."""

import pytest

from tests.benchmarks.programs import run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("gpu_kernels", ("mHC enter", "SwiGLU", "experts' products", "pool HCA", "attend CSA, selected", "select")),
        ("gpu_step", ("triton", "plain", "share of a step")),
        ("gpu_precision", ("computes here", "w1 of 32 experts", "to bf16", "fp8_fp4", "held out")),
        ("newton_schulz", ("plain", "symmetric", "Gram", "bf16")),
    ],
)
def test_runs(module: str, expected: tuple[str, ...]) -> None:
    done = run(module, "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    assert [name for name in ("copy  ", "bf16  ", "fp32  ", "fp8  ", *expected) if name not in done.stdout] == []


def test_real_sizes_are_for_a_gpu() -> None:
    done = run("gpu_kernels", "--device", "cpu")
    assert done.returncode == 2
    assert "expected --quick with it" in done.stderr
