"""Rounding to bf16 by chance: up or down with the probability that makes the mean right (R 3.4.1)."""

import hashlib

import torch
from torch import Tensor

DROPPED_BITS = 16
"""Bits of an fp32 number that bf16 does not have."""


def stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """x in bf16: its two neighbours there, each with a probability of 1 minus its distance in units of their distance.

    Source: R 3.4.1, for gradients that travel. x: fp32; what bf16 can hold stays as it is, and what is no number stays
    none. Compute: a random number of 16 bits is added to the bits that bf16 does not have, and the carry decides.
    Numbers within the last unit below the largest one of bf16 may become infinite.
    """
    noise = torch.randint(0, 1 << DROPPED_BITS, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = x.contiguous().view(torch.int32) + noise
    rounded = bits.bitwise_and_(-(1 << DROPPED_BITS)).view(torch.float32).bfloat16()
    # A carry out of a NaN of all ones, which is a GPU's, makes a zero.
    return rounded.masked_fill_(x.isnan(), torch.nan)


def generator_of(seed: int, *purpose: object, device: torch.device) -> torch.Generator:
    """A generator whose numbers are a function of the seed and the purpose alone."""
    name = "/".join(map(str, (seed, "round", *purpose)))
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator(device).manual_seed(key)
