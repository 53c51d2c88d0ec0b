"""Every kernel of the precision package called once, as tests.model.kernels.calls does it for the model's."""

from collections.abc import Callable, Sequence

import torch

from tests.model.kernels.calls import F, T, empty
from trainer.precision import kernels


def call_casts(dtype: torch.dtype) -> None:
    x = empty(T, F, dtype=dtype)
    kernels.recast_columns(kernels.cast_rows(x))
    kernels.cast_columns(x)


def call_swiglu(dtype: torch.dtype) -> None:
    gate, up = empty(T, F, dtype=dtype), empty(T, F, dtype=dtype)
    kernels.swiglu_cast(gate, up, empty(T), 10.0)
    kernels.swiglu_cast(gate, up, None, 10.0)


CALLS: Sequence[Callable[[torch.dtype], None]] = (call_casts, call_swiglu)
