"""Proves that the checksum is the sum its docstring says, and what it sees: every flipped bit, pairs of them, swaps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.flips import flip
from trainer.parallel import checksum
from trainer.parallel.checksum import Checksum

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8)
SMALL_CHUNK, SMALL_BLOCK = 8, 3


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> object:
    """Few words make many chunks, and more of them than a chunk has words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksum, "CHUNK", SMALL_CHUNK)
        patch.setattr(checksum, "BLOCK", SMALL_BLOCK)
        yield


def draw(dtype: torch.dtype, elements: int, seed: int = 1) -> Tensor:
    """Random bits of a type."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (elements * size,), dtype=torch.uint8, generator=generator).view(dtype)


def by_the_book(tensor: Tensor) -> int:
    """The docstring's formula in Python's integers."""
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(content + b"\0" * (-len(content) % 4), "<i4").tolist()
    inner = checksum._odd(checksum.INNER, SMALL_CHUNK).tolist()
    outer = checksum._odd(checksum.OUTER, 1 + len(words) // SMALL_CHUNK).tolist()
    total = sum(outer[i // SMALL_CHUNK] * inner[i % SMALL_CHUNK] * word for i, word in enumerate(words))
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def test_multipliers_are_odd_different_and_fixed() -> None:
    inner, outer = checksum._odd(checksum.INNER, 1 << 12), checksum._odd(checksum.OUTER, 1 << 12)
    assert bool((inner & 1).all() and (outer & 1).all())
    assert len({*inner.tolist(), *outer.tolist()}) == 2 << 12
    assert inner[:2].tolist() == [-1530673954295414549, 4064269471072392265], "other numbers on other machines"


@settings(deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 400), st.integers(0, 99))
def test_it_is_the_sum_it_is_said_to_be(dtype: torch.dtype, elements: int, seed: int) -> None:
    tensor = draw(dtype, elements, seed)
    assert int(Checksum()(tensor)) == by_the_book(tensor)


@settings(deadline=None)
@given(st.integers(0, 400))
def test_a_gpu_s_way_gives_the_same(words: int) -> None:
    word_P, inner_P = draw(torch.int32, words), checksum._odd(checksum.INNER, SMALL_CHUNK)
    in_blocks = checksum.chunk_sums_in_blocks(word_P, inner_P).tolist()
    one_by_one = checksum.chunk_sums(word_P, inner_P).tolist()
    assert in_blocks == one_by_one or in_blocks == [*one_by_one, 0]


@settings(deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 100))
def test_every_flipped_bit_is_seen(data: st.DataObject, dtype: torch.dtype, elements: int) -> None:
    tensor, of = draw(dtype, elements), Checksum()
    before = int(of(tensor))
    flip(tensor, data.draw(st.integers(0, 8 * tensor.nbytes - 1)))
    assert int(of(tensor)) != before


@settings(deadline=None)
@given(st.integers(0, 31), st.lists(st.integers(0, 99), min_size=2, max_size=8, unique=True))
def test_the_same_bit_flipped_in_several_words_is_seen(bit: int, words: list[int]) -> None:
    """A line that hangs, the top bit included: there sums of 64-bit words would see only odd numbers of flips."""
    tensor, of = draw(torch.float32, 100), Checksum()
    before = int(of(tensor))
    for word in words:
        flip(tensor, 32 * word + bit)
    assert int(of(tensor)) != before


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from([1, SMALL_CHUNK]))
def test_swapped_words_and_chunks_are_seen(left: int, right: int, size: int) -> None:
    tensor, of = draw(torch.int32, 100 * size), Checksum()
    swapped = tensor.clone().view(100, size)
    swapped[[left, right]] = swapped[[right, left]]
    assert (int(of(swapped)) == int(of(tensor))) == (left == right)


def test_swapped_tensors_are_seen() -> None:
    first, second = draw(torch.float32, 20), draw(torch.float32, 20, seed=2)
    of = Checksum().of_all
    assert of({"a": first, "b": second}) == {"a": int(Checksum()(first)), "b": int(Checksum()(second))}
    assert of({"a": first, "b": second}) != of({"a": second, "b": first})


@settings(deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 20), st.integers(0, 20))
def test_it_depends_on_the_elements_and_not_on_where_they_lie(dtype: torch.dtype, start: int, stop: int) -> None:
    """Rows of a tensor may begin in the middle of a word; a transposed one is read in the order of its elements."""
    whole, of = draw(dtype, 60).view(20, 3), Checksum()
    for part in (whole[start:stop], whole.mT[:, start:stop]):
        assert int(of(part)) == int(of(part.clone(memory_format=torch.contiguous_format)))


def test_of_no_elements_and_of_no_dimensions() -> None:
    assert int(Checksum()(torch.zeros(0))) == 0
    assert int(Checksum()(torch.tensor(3))) == by_the_book(torch.tensor([3])) != 0
    assert Checksum().of_all({}) == {}


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    for dtype in DTYPES:
        for elements in (1, 7, 1000):
            tensor = draw(dtype, elements)
            both = Checksum().of_all({"cpu": tensor, "gpu": tensor.cuda()})
            assert both["cpu"] == both["gpu"]
