"""Proves that layers shared out among ranks give the bits of one process, on both schedules, with data and experts.

Compared are each loss of each row, the gradient's norm, the loads, every weight and the optimizer's state, by name.
"""

from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

from model.init import initialize
from model.names import tensors
from model.transformer import Transformer
from optim.config import OptimConfig
from tests.dist import ranks, sessions
from tests.dist.ranks import Case, Steps
from tests.dist.test_parity import ids
from tests.runs import tiny
from trainer.config import ValidationConfig
from trainer.parallel.mesh import Mesh
from trainer.schedule_config import BatchConfig

Alone = Callable[[Case], Steps]
PIPE_2, PIPE_4 = Mesh(pipe=2), Mesh(pipe=4)
BOTH, ALL = Mesh(pipe=2, data=2, owners=2), Mesh(pipe=2, data=2, expert=2, owners=2)
RATIOS = (4, 8, 0, 4, 8, 4, 0, 8)
"""CSA, HCA and window layers, as many as are wanted."""
SHORT = (4, 3, 5)
"""One step of each attention mode; on two data ranks the last round of the second has a rank without a row."""
MANY = (8, 9, 8)
"""As many rows as DualPipeV asks for, which are two for each of its chunks on every data rank."""


def of_layers(number: int, rows: tuple[int, ...] = SHORT, dtype: str = "fp32", **changes: Any) -> Case:
    """Steps of a model with so many layers, the MTP branch besides."""
    sizes = {"num_hidden_layers": number, "compress_ratios": (*RATIOS[:number], 0)} | changes.pop("sizes", {})
    return Case(rows=rows, dtype=dtype, changes={"model": ranks.model(**sizes)} | changes)


def on(case: Case, **parallel: Any) -> Case:
    """The case as a layout takes it, with these keys of its configuration."""
    return replace(case, changes={**case.changes, "parallel": parallel})


def check(
    processes: BaseContext,
    alone: Alone,
    case: Case,
    mesh: Mesh,
    folder: Path,
    like: Case | None = None,
    **parallel: Any,
) -> None:
    found = ranks.run(processes, on(case, **parallel), mesh, folder)
    assert ranks.differences(alone(like or case), found) == []


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        (of_layers(2), PIPE_2),
        (of_layers(3, dtype="bf16"), ALL),
        pytest.param(of_layers(8), PIPE_4, marks=pytest.mark.slow),
    ],
    ids=ids,
)
def test_1f1b(case: Case, mesh: Mesh, processes: BaseContext, alone: Alone, tmp_path: Path) -> None:
    check(processes, alone, case, mesh, tmp_path)


def test_dualpipev(processes: BaseContext, alone: Alone, tmp_path: Path) -> None:
    """Uneven chunks; the first rank has both ends, so that it shares the embedding with itself."""
    case = of_layers(5, rows=(4, 5, 6))
    check(processes, alone, case, PIPE_2, tmp_path, schedule="dualpipev", stages=(1, 2, 1, 1))


TEN = (4, 3, 5, 2, 4, 2, 7, 4, 3, 4)
TEN_MANY = (8, 9, 8, 10, 8, 9, 8, 8, 9, 8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [
        (PIPE_2, "1f1b"),
        (PIPE_4, "1f1b"),
        (BOTH, "1f1b"),
        (ALL, "1f1b"),
        (Mesh(pipe=2, data=3, owners=3), "1f1b"),
        (Mesh(pipe=3), "1f1b"),
        (Mesh(pipe=4, data=2, expert=2, owners=2), "1f1b"),
        (Mesh(pipe=2, data=4, expert=2, owners=2), "1f1b"),
        (PIPE_2, "dualpipev"),
        (ALL, "dualpipev"),
        (Mesh(pipe=2, data=2, owners=1), "dualpipev"),
    ],
    ids=ids,
)
def test_ten_steps_of_eight_layers(
    mesh: Mesh, schedule: str, dtype: str, processes: BaseContext, alone: Alone, tmp_path: Path
) -> None:
    rows = TEN if schedule == "1f1b" else TEN_MANY
    check(processes, alone, of_layers(8, rows=rows, dtype=dtype), mesh, tmp_path, schedule=schedule)


VARIANTS = {
    "no MTP": (of_layers(3, sizes={"num_nextn_predict_layers": 0, "compress_ratios": RATIOS[:3]}), PIPE_2, {}),
    "all hashed": (of_layers(2, sizes={"num_hash_layers": 2}), PIPE_2, {}),
    "frozen": (of_layers(2, optim=OptimConfig(freeze=("router", "embedding"))), BOTH, {}),
    "always clipped": (of_layers(2, optim=OptimConfig(clip_norm=1e-2)), BOTH, {}),
    "one row": (of_layers(2, rows=(1, 1, 1)), ALL, {}),
    "written and read again": (replace(of_layers(3, dtype="bf16"), saved_after=2), ALL, {"stages": (2, 1)}),
    "written by DualPipeV": (replace(of_layers(4, rows=(4, 5, 6)), saved_after=2), PIPE_2, {"schedule": "dualpipev"}),
}
SOONER = ("no MTP", "written and read again")


@pytest.mark.parametrize(
    "name", [name if name in SOONER else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_other_models_and_splits(name: str, processes: BaseContext, alone: Alone, tmp_path: Path) -> None:
    case, mesh, parallel = VARIANTS[name]
    check(processes, alone, case, mesh, tmp_path, like=replace(case, saved_after=0), **parallel)


@pytest.mark.slow
@pytest.mark.parametrize("what", [("attention", "experts"), ("block",)], ids="-".join)
def test_computed_again_inside_a_stage(
    what: tuple[str, ...], processes: BaseContext, alone: Alone, tmp_path: Path
) -> None:
    check(processes, alone, of_layers(3, recompute=what), ALL, tmp_path, like=of_layers(3))


# the fast path


def fast(rows: tuple[int, ...], **parallel: Any) -> Case:
    return on(of_layers(4, rows=rows), reduction="fast", **parallel)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "schedule"), [(ALL, "1f1b"), (PIPE_2, "dualpipev")], ids=ids)
def test_the_fast_path_has_the_same_bits_again(
    mesh: Mesh, schedule: str, processes: BaseContext, tmp_path: Path
) -> None:
    case = fast(MANY, schedule=schedule, stream="bf16")
    again = [ranks.run(processes, case, mesh, tmp_path / name) for name in ("first", "second")]
    assert ranks.differences(*again) == []


@pytest.mark.parametrize(
    ("stream", "slack"),
    # Streams of 8 bits of mantissa pass one border, forwards and backwards; fp32: sums of five rows and a norm.
    [("model", 1e-5), pytest.param("bf16", 2.0**-5, marks=pytest.mark.slow)],
)
def test_the_fast_path_is_near(stream: str, slack: float, processes: BaseContext, alone: Alone, tmp_path: Path) -> None:
    """After one step momentum is the clipped gradient, that of the embedding, used on two stages, among them."""
    reference = alone(of_layers(4, rows=(5,)))
    found = ranks.run(processes, fast((5,), stream=stream), PIPE_2, tmp_path)
    errors = {
        name: float((found.tensors[name] - exact).norm() / exact.norm())
        for name, exact in reference.tensors.items()
        if name.startswith(("momentum/", "exp_avg/")) and exact.any()
    }
    assert {"exp_avg/embed.weight", "exp_avg/head.weight"} <= errors.keys()
    assert max(errors.values()) < slack, errors
    assert stream == "model" or max(errors.values()) > 1e-4, "it did travel in bf16"


# a model that is cut


def test_a_model_of_some_layers_has_their_names_and_values() -> None:
    config = ranks.model(num_hidden_layers=4, compress_ratios=(*RATIOS[:4], 0))
    whole, init = Transformer(config), tiny.config(Path("none"), Path("none")).init
    initialize(whole, init, 3)
    cut = [Transformer(config, layers=layers) for layers in ((0,), (1, 2), (3,))]
    found: dict[str, torch.Tensor] = {}
    for part in cut:
        initialize(part, init, 3)
        for name, tensor in tensors(part).items():
            assert torch.equal(tensor, tensors(whole)[name]), name
            found[name] = tensor
    assert found.keys() == tensors(whole).keys()
    assert "embed.weight" in tensors(cut[2]), "the MTP branch embeds tokens, too"


# whole runs


@pytest.mark.slow
def test_a_run_by_dualpipev(processes: BaseContext, corpus: Path, tmp_path: Path) -> None:
    """Metrics, held-out losses of fewer rows than the schedule asks for, a sample, the last checkpoint."""
    runs = []
    for name, mesh, parallel in (("alone", Mesh(), {}), ("staged", PIPE_2, {"schedule": "dualpipev"})):
        config = sessions.config(
            corpus,
            tmp_path / name,
            mesh,
            model=of_layers(4).changes["model"],
            schedule=tiny.schedule(total_tokens=1700, batch=BatchConfig(tokens=240, start_tokens=240)),
            validation=ValidationConfig(every_steps=3, rows=2),
        )
        config = replace(config, parallel=replace(config.parallel, **parallel))
        session = sessions.Session(processes, config)
        assert session.wait() == [0] * mesh.size, session.said()
        runs.append(tiny.only_run(session.runs_dir))
    tiny.assert_same_run(*runs)
