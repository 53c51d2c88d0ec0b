"""DeepSpeed's door: its pipeline schedules and its sends between stages, and nothing else of it.

DeepSpeed 0.19.8 has two executors of pipeline schedules, PipelineEngine (1F1B) and DualPipeVEngine, whose methods carry
out a schedule's instructions one by one. The classes here are such engines with a constructor of their own: loading,
the passes, reductions and the optimizer's step are ours, so that DeepSpeed's engine proper, with its wrappers of
optimizers, loss scaling, gradient reduction and checkpoints, is never built. What is used of it has no promise of
staying as it is: so the version is pinned, and each name is looked up before the first step.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

VERSION = "0.19.8"
"""The only release that the names below were held against."""
SENDS = ("_exec_send_activations", "_exec_recv_activations", "_exec_send_grads", "_exec_recv_grads")
USED = {
    PipelineEngine: (*SENDS, "_INSTRUCTION_MAP", "_exec_schedule", "_reserve_pipe_buffers", "reset_activation_shape"),
    DualPipeVEngine: (*SENDS, "_INSTRUCTION_MAP", "_exec_commit_p2p", "_phase", "_phase1_buffer", "_is_loss_stage"),
    p2p: ("init_process_groups", "send", "recv"),
    schedule: ("TrainSchedule", "InferenceSchedule", "DualPipeVSchedule"),
}
"""What is used of DeepSpeed and has a leading underscore or stands in no documentation, by its owner."""


class Passes(Protocol):
    """The computation of a stage. turn: number of the row among those of this rank. layers: which of this stage's.

    forward: the streams after these layers, or the loss after the last. x_BTND: a leaf, None before the first layer.
    backward: leaves x_BTND.grad. grad_BTND: of what `forward` returned, None where that was the loss.
    """

    def forward(self, turn: int, layers: range, x_BTND: Tensor | None) -> Tensor: ...

    def backward(self, turn: int, layers: range, grad_BTND: Tensor | None) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """The ranks that hand each other the streams of the same rows, first stage first, and which of them this one is.

    It is what DeepSpeed calls a grid. layers: of this rank's chunks, one of 1F1B, two of DualPipeV.
    """

    ranks: tuple[int, ...]
    stage: int
    layers: tuple[range, ...]
    device: torch.device

    @property
    def pipe_parallel_size(self) -> int:
        return len(self.ranks)

    def get_stage_id(self) -> int:
        return self.stage

    def stage_to_global(self, stage_id: int) -> int:
        return self.ranks[stage_id]


class OneForwardOneBackward(PipelineEngine):
    """1F1B (PipeDream-Flush): each stage has as many rows under way as there are stages from it on."""

    def __init__(self, column: Column) -> None:
        """Every rank of the column constructs its own; they speak with each other once."""
        torch.nn.Module.__init__(self)  # not DeepSpeed's: see the top of this file
        self.grid, self.device, self.num_stages = column, column.device, column.pipe_parallel_size
        self.stage_id, self.prev_stage, self.next_stage = column.stage, column.stage - 1, column.stage + 1
        self.has_attention_mask = self.has_bool_tensors = self.dynamic_shape = False
        self.is_pipe_partitioned = self.is_grad_partitioned = False
        self.num_pipe_buffers, self.micro_batches = 0, 0
        self.pipe_buffers: dict[str, list[Any]] = {kind: [] for kind in ("inputs", "labels", "outputs")}
        self.loss: Any = None
        self.grad_layer: Any = None
        self._layers, self._turns = column.layers, tuple[int, ...]()
        self._passes: Passes | None = None
        self._shape: tuple[int, ...] | None = None
        self._done = {"forward": [0, 0], "backward": [0, 0]}
        self.reset_activation_shape()
        p2p.init_process_groups(column)
        self._meet()

    def learn(self, passes: Passes, turns: Sequence[int], shape: tuple[int, ...]) -> None:
        """Forward and backward passes of these turns, in this order on every stage. shape: of the streams."""
        self._run(passes, turns, shape, self._train_schedule)

    def measure(self, passes: Passes, turns: Sequence[int], shape: tuple[int, ...]) -> None:
        """Forward passes alone, without gradients."""
        with torch.no_grad():
            self._run(passes, turns, shape, lambda: self._inference_schedule(self.micro_batches))

    def wall_clock_breakdown(self) -> bool:
        """DeepSpeed's own timers are not used."""
        return False

    def _run(self, passes: Passes, turns: Sequence[int], shape: tuple[int, ...], order: Any) -> None:
        if not turns:
            return
        if shape != self._shape:
            self.reset_activation_shape()
        self._passes, self._turns, self._shape = passes, tuple(turns), shape
        self._done = {"forward": [0, 0], "backward": [0, 0]}
        self.micro_batches = len(turns)
        self._exec_schedule(order())
        self._passes = None

    def _meet(self) -> None:
        """A number from stage to stage: connections are made before they count. Even stages speak first."""
        number = torch.zeros(1, device=self.device)
        speak = [(p2p.send, self.next_stage)] if self.next_stage < self.num_stages else []
        listen = [(p2p.recv, self.prev_stage)] if self.stage_id else []
        for act, neighbour in (*speak, *listen) if self.stage_id % 2 == 0 else (*listen, *speak):
            act(number, neighbour)

    def _turn(self, way: str, phase: int) -> int:
        """The next turn of a phase: schedules take rows in their order."""
        number = self._done[way][phase]
        self._done[way][phase] += 1
        return self._turns[number]

    def _where(self) -> int:
        """The chunk that the instruction is about."""
        return 0

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        """Each stage draws its own ids."""

    def _exec_forward_pass(self, buffer_id: int) -> None:
        assert self._passes is not None
        phase = self._where()
        outputs = self._passes.forward(
            self._turn("forward", phase), self._layers[phase], self.pipe_buffers["inputs"][buffer_id]
        )
        self.pipe_buffers["outputs"][buffer_id] = outputs
        if self.is_last_stage():
            self.loss = outputs

    def _exec_backward_pass(self, buffer_id: int) -> None:
        assert self._passes is not None
        phase = self._where()
        grad_BTND = None if self.is_last_stage() else self.grad_layer
        self.pipe_buffers["outputs"][buffer_id] = None
        self._passes.backward(self._turn("backward", phase), self._layers[phase], grad_BTND)

    def _exec_nothing(self) -> None:
        """Reductions and the optimizer's step come after the schedule."""

    _INSTRUCTION_MAP: ClassVar = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _exec_load_micro_batch,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.ReduceTiedGrads: _exec_nothing,
        schedule.ReduceGrads: _exec_nothing,
        schedule.OptimizerStep: _exec_nothing,
    }


class DualPipeV(DualPipeVEngine, OneForwardOneBackward):  # pyrefly: ignore[inconsistent-inheritance]
    """DualPipeV: a stage has a chunk on the way out and one on the way back, and works on both in turn.

    DualPipeVEngine's methods call the next class's for a pass, which is the one above.
    """

    def __init__(self, column: Column) -> None:
        self._active_phase: int | None = None
        OneForwardOneBackward.__init__(self, column)
        self.module = _Phases()
        self._p2p_ops: list[Any] = []
        self.pipe_buffers |= {"grads": [], "losses": []}

    def measure(self, passes: Passes, turns: Sequence[int], shape: tuple[int, ...]) -> None:
        """Forward passes alone; as often as the schedule needs them, the last again and again."""
        missing = 2 * self.num_stages - len(turns) if turns else 0
        super().measure(passes, [*turns, *list(turns[-1:]) * missing], shape)

    def _where(self) -> int:
        assert self._active_phase is not None, "inside _phase"
        return self._active_phase

    _INSTRUCTION_MAP: ClassVar = {
        **OneForwardOneBackward._INSTRUCTION_MAP,
        **{
            instruction: method
            for instruction, method in DualPipeVEngine._INSTRUCTION_MAP.items()
            if instruction not in (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)
        },
    }


class _Phases:
    """What DualPipeVEngine has for a module: it is told the phase, which `_where` reads from the engine."""

    def activate_phase(self, phase: int) -> None:
        """Nothing to do."""


class _NoBuilds(CPU_Accelerator):
    """DeepSpeed on a CPU, which would compile an operation for its collectives first: none of them is used here."""

    def create_op_builder(self, op_name: str) -> None:
        """None: nothing is compiled."""
        return


Engine = OneForwardOneBackward | DualPipeV


def engine(kind: str, column: Column) -> Engine:
    """An executor of the schedule 1f1b or dualpipev. Raises ValueError where DeepSpeed is not the one that is known."""
    require_known()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if column.device.type == "cpu" and not isinstance(get_accelerator(), _NoBuilds):
        set_accelerator(_NoBuilds())
    comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return (DualPipeV if kind == "dualpipev" else OneForwardOneBackward)(column)


def require_known() -> None:
    """Raise ValueError unless DeepSpeed has the version and the names that this file was written for."""
    if deepspeed.__version__ != VERSION:
        raise ValueError(f"deepspeed = {deepspeed.__version__}: expected {VERSION}, whose schedules are the known ones")
    for owner, names in USED.items():
        for name in names:
            if not hasattr(owner, name):
                raise ValueError(f"deepspeed = {VERSION}: expected {owner.__name__}.{name}, which this one lacks")
