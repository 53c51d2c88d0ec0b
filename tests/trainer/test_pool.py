"""Proves that rows side by side share one model, have gradients of their own, and tell results and errors in order."""

import threading
import time

import pytest
import torch

from model.init import initialize
from model.transformer import Transformer
from tests.runs import tiny
from trainer.pool import RowPool, view_of


def make_model() -> Transformer:
    model = Transformer(tiny.model())
    initialize(model, tiny.InitConfig(), seed=1)
    return model


def test_a_view_is_the_same_model_with_gradients_of_its_own() -> None:
    model = make_model()
    view = view_of(model)
    originals, mine = dict(model.named_parameters()), dict(view.named_parameters())
    assert mine.keys() == originals.keys()
    for name, parameter in mine.items():
        assert parameter is not originals[name]
        assert parameter.data_ptr() == originals[name].data_ptr()
    assert all(a is b for a, b in zip(view.buffers(), model.buffers(), strict=True))
    token_BT = torch.arange(24).unsqueeze(0)
    with torch.no_grad():
        model.layers[1].ffn.gate.bias += 0.5
        model.embed.weight.mul_(2)
        assert all(parameter._version == originals[name]._version for name, parameter in mine.items())
        assert torch.equal(view(token_BT).h_BTD, model(token_BT).h_BTD)
    view(token_BT).h_BTD.sum().backward()
    assert mine["norm.weight"].grad is not None
    assert all(parameter.grad is None for parameter in originals.values())


def test_each_view_works_on_one_row_at_a_time_and_results_keep_their_order() -> None:
    pool = RowPool(make_model(), 3)
    busy: list[int] = []
    most, lock = 0, threading.Lock()

    def work(model: Transformer, item: int) -> int:
        nonlocal most
        with lock:
            assert id(model) not in busy
            busy.append(id(model))
            most = max(most, len(busy))
        time.sleep(0.01 * (7 - item))
        with lock:
            busy.remove(id(model))
        return item * item

    assert list(pool.map(work, range(7))) == [item * item for item in range(7)]
    assert most == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_row_is_raised_and_the_views_stay_usable(threads: int) -> None:
    pool = RowPool(make_model(), threads)

    def fail(model: Transformer, item: int) -> int:
        if item == 2:
            raise OverflowError("row 2")
        return item

    for _ in range(3):
        with pytest.raises(OverflowError, match="row 2"):
            list(pool.map(fail, range(4)))
    assert list(pool.map(lambda model, item: item, range(4))) == [0, 1, 2, 3]


def test_one_thread_runs_in_the_caller() -> None:
    names = RowPool(make_model(), 1).map(lambda model, item: threading.current_thread(), range(2))
    assert set(names) == {threading.current_thread()}


def test_each_thread_has_one_core() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(RowPool(make_model(), 2).map(lambda model, item: torch.get_num_threads(), range(4))) == {1}
    finally:
        torch.set_num_threads(before)
