"""Tensors by name into tensors of the same names: nothing is broadcast, cast or left out on the way."""

from collections.abc import Mapping

import torch
from torch import Tensor


def copy_exactly(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Copy every value into the target of its name.

    Raises ValueError, nothing copied, naming `what` and the tensor, unless names, shapes and dtypes are the same.
    """
    for name in sorted(targets.keys() ^ values.keys()):
        found, expected = ("nothing", "a tensor") if name in targets else ("a tensor", "none of this name")
        raise ValueError(f"{what} {name} = {found}: expected {expected}")
    for name, target in targets.items():
        if _described(values[name]) != _described(target):
            raise ValueError(f"{what} {name} = {_described(values[name])}: expected {_described(target)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
