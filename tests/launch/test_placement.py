"""Proves that a process finds its place in the environment, that half a place or a wrong one is one line, and that the
places that keel itself and torchrun give let real processes meet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.main import COMPLAINT
from launch.placement import from_environment
from trainer.config import ParallelConfig
from trainer.parallel.placement import Placement

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120
MESH = ParallelConfig(data=4, expert=2)
PLAIN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}


def test_plain_variables_give_the_place() -> None:
    assert from_environment(PLAIN, MESH) == Placement(rank=3, size=4, local_rank=1, address="tcp://node-0:29500")


def test_torchrun_s_variables_give_the_place() -> None:
    more = {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "ROLE_RANK": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert from_environment(PLAIN | more, MESH) == from_environment(PLAIN, MESH)


def test_an_address_of_colons_stands_in_brackets() -> None:
    place = from_environment(PLAIN | {"MASTER_ADDR": "fe80::1"}, MESH)
    assert place is not None
    assert place.address == "tcp://[fe80::1]:29500"


@pytest.mark.parametrize("environment", [{}, {"RANK": "", "WORLD_SIZE": ""}, {"MASTER_ADDR": "x", "LOCAL_RANK": "1"}])
def test_without_rank_and_world_size_there_is_none(environment: dict[str, str]) -> None:
    assert from_environment(environment, MESH) is None


@pytest.mark.parametrize("more", [{}, {"LOCAL_RANK": "2"}])
def test_one_process_meets_nobody(more: dict[str, str]) -> None:
    local_rank = int(more.get("LOCAL_RANK", 0))
    found = from_environment({"RANK": "0", "WORLD_SIZE": "1", **more}, ParallelConfig())
    assert found == Placement(rank=0, size=1, local_rank=local_rank, address="")


@pytest.mark.parametrize("missing", list(PLAIN))
def test_half_a_place_is_refused(missing: str) -> None:
    for rest in ({}, {missing: ""}):
        environment = {name: value for name, value in PLAIN.items() if name != missing} | rest
        with pytest.raises(ValueError, match=f"^{missing} = : expected all of RANK, WORLD_SIZE, .* or none of them$"):
            from_environment(environment, MESH)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "4", "a whole number from 0 to 3"),
        ("RANK", "-1", "a whole number from 0 to 3"),
        ("RANK", "first", "a whole number from 0 to 3"),
        ("RANK", "²", "a whole number from 0 to 3"),
        ("LOCAL_RANK", "4", "a whole number from 0 to 3"),
        ("WORLD_SIZE", "0", "a whole number from 1 on"),
        ("WORLD_SIZE", "4.0", "a whole number from 1 on"),
        ("MASTER_PORT", "0", "a whole number from 1 to 65535"),
        ("MASTER_PORT", "65536", "a whole number from 1 to 65535"),
    ],
)
def test_a_wrong_value_is_refused(name: str, value: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name} = {value}: expected {expected}')}$"):
        from_environment(PLAIN | {name: value}, MESH)


@pytest.mark.parametrize(
    ("size", "parallel", "said"),
    [
        (3, MESH, "WORLD_SIZE = 3: expected 4 processes, the mesh of parallel.pipe=1 x parallel.context=1 x"),
        (1, MESH, "parallel.data=4; keel starts them itself where RANK and WORLD_SIZE are not set"),
        (2, ParallelConfig(), "WORLD_SIZE = 2: expected 1 process, the mesh of"),
    ],
)
def test_another_number_of_processes_is_refused(size: int, parallel: ParallelConfig, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        from_environment(PLAIN | {"WORLD_SIZE": str(size)}, parallel)
    assert COMPLAINT.fullmatch(str(caught.value))


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OWN = ["-c", "import sys; from launch.local import run; sys.exit(run([sys.executable, *sys.argv[1:]], 2))"]


@pytest.mark.parametrize("starter", [OWN, pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["own", "torchrun"])
def test_real_processes_meet(starter: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, *starter, str(Path(__file__).with_name("meeting.py")), "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 0, ended.stderr
    assert "rank 0 has met 2\n" in ended.stdout
