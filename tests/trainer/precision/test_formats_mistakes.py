"""Deliberate mistakes in the text of formats.py: the golden set, or codes that must come back, must show each."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.trainer.precision.golden import golden, wrong
from tests.trainer.precision.mistaken import mistaken
from trainer.precision import formats
from trainer.precision.elements import E2M1_1X32

MISTAKES: dict[str, tuple[tuple[str, str], ...]] = {
    "a logarithm of the quotient": (
        (
            "exponent = ((bits + (MANTISSA - mantissa)) >> MANTISSA_BITS) - k",
            "exponent = (bits.view(torch.float32) / LARGEST[format.element]).log2().ceil().nan_to_num().int() + BIAS",
        ),
    ),
    "scale rounded down": (("((bits + (MANTISSA - mantissa)) >> MANTISSA_BITS)", "(bits >> MANTISSA_BITS)"),),
    "one more at the boundary itself": (("(MANTISSA - mantissa)", "(MANTISSA + 1 - mantissa)"),),
    "no floor": ((".clamp_min(format.floor)", ""),),
    "floor of the other element": ((".clamp_min(format.floor)", ".clamp_min(1e-4 if format.floor else 0.0)"),),
    "an infinity is a large number": (
        ("torch.where(amax.isfinite(), exponent.clamp_min(0), NAN_EXPONENT)", "exponent.clamp_min(0)"),
    ),
    "negative exponents wrap": (("exponent.clamp_min(0)", "exponent"),),
    "only the number itself is NaN": (("torch.where(exponent == NAN_EXPONENT, -1, 0)", "torch.zeros_like(exponent)"),),
    "e4m3 truncated": (
        (
            "value.clamp_(-largest, largest)",
            "value.clamp_(-largest, largest).view(torch.int32).bitwise_and_(-1 << 20).view(torch.float32)",
        ),
    ),
    "e4m3 ties away from zero": (
        (
            "value.clamp_(-largest, largest)",
            "(value + value.sign() * value.abs().frexp()[1].clamp_min(-5).sub(24).exp2()).clamp_(-largest, largest)",
        ),
    ),
    "e4m3 without subnormal numbers": (
        ("value.clamp_(-largest, largest)", "torch.where(value.abs() < 2.0**-6, 0 * value, value)"),
    ),
    "e2m1 truncated": ((".add(power.view(torch.float32))", ".add(power.view(torch.float32) - 0.25)"),),
    "e2m1 ties away from zero": (("size.view(torch.float32)", "(size.view(torch.float32) * (1 + 2.0**-23))"),),
    "e2m1 with steps of 0.25 below 1": ((".clamp_(min=ONE)", ".clamp_(min=ONE - (1 << MANTISSA_BITS))"),),
    "e2m1 without a sign": ((".bitwise_and_(SIGN_E2M1)", ".bitwise_and_(0)"),),
    "-0 is 0": (("bits = value.view(torch.int32)", "bits = (value + 0.0).view(torch.int32)"),),
    "borders filled up with ones": (("-rows % block[0]))", "-rows % block[0]), value=1.0)"),),
    "columns for rows": (("x.unsqueeze(0) if x.dim() == 1 else x\n", "x\n    block = block[::-1]\n"),),
}
"""In codes or exponents."""

UNSEEN_BY_CODES: dict[str, tuple[tuple[str, str], ...]] = {
    "nibbles exchanged": (
        ("codes[..., 0::2] | (codes[..., 1::2] << 4)", "(codes[..., 0::2] << 4) | codes[..., 1::2]"),
    ),
    "nibbles exchanged on the way back": (("(packed & 15, packed >> 4)", "(packed >> 4, packed & 15)"),),
    "halves instead of pairs": (
        (
            "codes[..., 0::2] | (codes[..., 1::2] << 4)",
            "codes[..., : codes.shape[-1] // 2] | (codes[..., codes.shape[-1] // 2 :] << 4)",
        ),
    ),
    "given scales are not taken": (
        ("torch.where(block_amax(x, format.block).isfinite(), exponent, NAN_EXPONENT)", "exponents(x, format)"),
    ),
    "scale off by one on the way back": (
        ("bits = exponent.to(torch.int32) <<", "bits = (exponent.to(torch.int32) + 1) <<"),
    ),
    "2^-127 is zero": (("torch.where(exponent == 0, smallest,", "torch.where(exponent == 0, 0,"),),
    "table without signs": (("torch.cat((positive, -positive))", "torch.cat((positive, positive))"),),
}
"""In packing, decoding and encoding at a given scale."""


def all_wrong(module: ModuleType) -> int:
    """Codes and exponents of the golden set that differ."""
    return sum(wrong(case, module) for case in golden())


def comes_back(module: ModuleType) -> bool:
    """Whether packed codes with scales that no amax decided mean what they must, and come back."""
    byte = torch.arange(64, dtype=torch.uint8).view(2, 32)
    low, high = byte & 7, (byte >> 3 & 7) | 8
    scale = torch.tensor([[0, 9], [130, 250]], dtype=torch.uint8)
    codes = module.unpack(low | high << 4, 64)
    found = module.encode_at(module.decode(module.Coded(codes=codes, exponents=scale), E2M1_1X32), E2M1_1X32, scale)
    size = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    value = torch.stack((size[low.int()], -size[high.int() & 7]), -1).flatten(-2)
    of_scale = (scale.double() - 127).exp2().repeat_interleave(32, 1)
    decoded = module.decode(found, E2M1_1X32).double()
    return torch.equal(module.pack(found.codes), low | high << 4) and torch.equal(decoded, value * of_scale)


def test_without_a_mistake_nothing_is_wrong(tmp_path: Path) -> None:
    module = mistaken(tmp_path, formats, ())
    assert all_wrong(module) == 0
    assert comes_back(module)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    assert all_wrong(mistaken(tmp_path, formats, MISTAKES[name])) > 0


@pytest.mark.parametrize("name", UNSEEN_BY_CODES)
def test_a_mistake_on_the_way_back_is_seen(name: str, tmp_path: Path) -> None:
    assert not comes_back(mistaken(tmp_path, formats, UNSEEN_BY_CODES[name]))
