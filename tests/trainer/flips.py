"""Flipped bits, and the tensors of a rank that can have one."""

import torch
from torch import Tensor

from model import names
from trainer.step import Parts


def flip(tensor: Tensor, bit: int) -> None:
    """Turn round one bit of a tensor's memory, counted from its beginning; a second time turns it back."""
    byte_P = tensor.detach().view(-1).view(torch.uint8)
    byte_P[bit // 8] ^= 1 << bit % 8


def tensors(parts: Parts) -> dict[str, Tensor]:
    """All that a rank has and a checkpoint holds, by name."""
    of_model = {f"model/{name}": tensor for name, tensor in names.tensors(parts.model).items()}
    return of_model | {f"optimizer/{name}": tensor for name, tensor in parts.optimizer.state_dict().items()}
