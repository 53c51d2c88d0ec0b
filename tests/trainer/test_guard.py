"""Proves that one flipped bit in anything a checkpoint holds is found and named on one process, and no bit wrongly."""

import math
from dataclasses import replace

import pytest
import torch

from tests.trainer import steps
from tests.trainer.flips import flip, tensors
from trainer.debug.fault import NonFinite
from trainer.guard import Corrupted, Finding, Guard, describe
from trainer.parallel.owners import Handout
from trainer.schedule import StepPlan
from trainer.step import Parts, train_step

STEPS = 4
EVERY_STEP = 1


def prepared(dtype: str = "fp32") -> tuple[Parts, StepPlan]:
    """The tiny model after one step, so that no state is zero, and the plan of the next."""
    parts = steps.make_parts(steps.make_batch(), dtype)
    steps.take(parts, steps.make_plan())
    return parts, replace(steps.make_plan(), rows=len(parts.stream.batch.token_BT))


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_nothing_is_found_where_nothing_is_wrong(dtype: str) -> None:
    parts, plan = prepared(dtype)
    guard = Guard(parts, EVERY_STEP)
    guard.begin(0)
    for done in range(1, STEPS):
        assert train_step(parts, plan, lambda: False, guard.before_update) is not None
        guard.after_step(done, saves=done % 2 == 0)
        guard.before_save(done)
        assert guard.seconds() > 0


def test_a_bit_that_flips_at_rest_is_found_whatever_has_it() -> None:
    """Before the next update and before a save, in turn; in bf16, which has masters too."""
    parts, _ = prepared("bf16")
    guard = Guard(parts, EVERY_STEP)
    guard.begin(5)
    ways = ((guard.before_update, 6), (lambda: guard.before_save(5), 5))
    for number, (name, tensor) in enumerate(tensors(parts).items()):
        verify, step = ways[number % 2]
        flip(tensor, 7 * number % (8 * tensor.nbytes))
        with pytest.raises(Corrupted) as caught:
            verify()
        said = str(caught.value)
        assert said.startswith(f"step {step}: {name} on rank 0 = checksum ")
        assert said.endswith("as after step 5; nothing has written to it since")
        flip(tensor, 7 * number % (8 * tensor.nbytes))
    guard.before_update()


@pytest.mark.parametrize("of", ["weight", "master"])
def test_a_weight_is_its_master_rounded_when_it_is_handed_out(of: str) -> None:
    """A high bit of either, between the update and the look."""
    parts, _ = prepared("bf16")
    guard, every = Guard(parts, EVERY_STEP), tensors(parts)
    masters = {name.removeprefix("optimizer/master/") for name in every if "/master/" in name}
    assert len(masters) > 10
    for name in sorted(masters):
        one, bit = (every[f"optimizer/master/{name}"], 30) if of == "master" else (every[f"model/{name}"], 14)
        flip(one, bit)
        with pytest.raises(Corrupted, match="its master rounded") as caught:
            guard.after_step(3, saves=False)
        assert str(caught.value).startswith(f"step 3: model/{name} on rank 0 = checksum ")
        flip(one, bit)


def test_it_looks_at_every_so_many_steps_and_before_saves_and_forgets_with_the_next_update() -> None:
    parts, _ = prepared()
    guard, weight = Guard(parts, 3), parts.model.norm.weight
    for done, saves, looks in ((1, False, False), (2, True, True), (3, False, True), (4, False, False)):
        guard.after_step(done, saves=saves)
        flip(weight, 0)
        if looks:
            with pytest.raises(Corrupted):
                guard.before_update()
        else:
            guard.before_update()
    guard.before_save(4)
    flip(weight, 0)
    with pytest.raises(Corrupted):
        guard.before_save(4)


def test_it_never_looks_where_that_is_switched_off() -> None:
    parts, _ = prepared()
    guard = Guard(parts, 0)
    guard.begin(0)
    guard.after_step(1, saves=True)
    flip(parts.model.norm.weight, 0)
    guard.before_save(1)
    guard.before_update()
    assert guard.seconds() == 0


def test_weights_that_are_on_their_way_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, _ = prepared()
    guard, came = Guard(parts, EVERY_STEP), []

    def settle(handout: Handout) -> None:
        came.append(flip(parts.model.norm.weight, 0))

    monkeypatch.setattr(Handout, "settle", settle)
    guard.after_step(1, saves=False)
    assert len(came) == 1
    guard.before_update()


def test_a_row_that_is_no_number_because_of_a_flipped_bit_is_not_blamed() -> None:
    """The bit that makes 1 infinite."""
    parts, plan = prepared()
    guard, weight = Guard(parts, EVERY_STEP), parts.model.layers[1].attn_norm.weight
    with torch.no_grad():
        weight[0] = 1
    guard.begin(1)
    flip(weight, 30)
    assert math.isinf(weight[0].item())
    with pytest.raises(Corrupted, match=r"step 2: model/layers\.1\.attn_norm\.weight"):
        train_step(parts, plan, lambda: False, guard.before_update)
    with pytest.raises(NonFinite):
        train_step(parts, plan, lambda: False)


def replicas(**sums: int) -> list[list[Finding]]:
    """What the ranks of one group find of a tensor: r0=..., r1=..."""
    ranks = tuple(int(name[1:]) for name in sums)
    by_rank = {int(name[1:]): [Finding(tensor="model/x", found=found, ranks=ranks)] for name, found in sums.items()}
    return [by_rank.get(rank, []) for rank in range(6)]


def test_the_majority_names_the_ranks_and_without_one_all_are_named() -> None:
    a, b, c = "000000000000000a", "000000000000000b", "fffffffffffffffe"
    assert describe(7, replicas(r0=10, r1=11)) == (
        f"step 7: model/x on ranks 0, 1 = checksums {a}, {b}: expected the same bits"
    )
    assert describe(7, replicas(r0=10, r2=-2, r4=10)) == (
        f"step 7: model/x on rank 2 = checksum {c}: expected {a}, as on the other 2 ranks"
    )
    assert describe(7, replicas(r0=10, r1=-2, r2=10, r3=11, r4=10)) == (
        f"step 7: model/x on ranks 1, 3 = checksums {c}, {b}: expected {a}, as on the other 3 ranks"
    )
    assert describe(7, replicas(r0=10, r1=10, r2=11, r3=11)) == (
        f"step 7: model/x on ranks 0, 1, 2, 3 = checksums {a}, {a}, {b}, {b}: expected the same bits"
    )


def test_what_a_rank_knows_by_itself_comes_before_what_its_replicas_say() -> None:
    found = replicas(r0=10, r1=11)
    found[1].append(Finding(tensor="model/z", found=1, expected=2, because="its master rounded"))
    found[2].append(Finding(tensor="model/y[0:2]", found=3, expected=4, because="as before"))
    assert describe(9, found) == (
        f"step 9: model/y[0:2] on rank 2 = checksum {3:016x}: expected {4:016x}, as before (and 2 more like it)"
    )
