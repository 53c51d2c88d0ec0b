"""Which layers each chunk of the pipeline has: as told, or so that the dearest pipe rank costs as little as possible.

A chunk is a contiguous range of main layers. 1F1B: rank r of P has chunk r. DualPipeV: ranks have chunks r and
2 P - 1 - r, so that rank 0 has both ends. The first chunk has the embedding too, which is looked up and costs nothing;
the last one the head and the MTP branch. Costs are FLOP of a row forwards and backwards, attention sparse
(`model.count.depth_flops`). Weights cannot move while a run goes on, so that ranks are balanced for one length of rows,
that of most tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from model.config import ModelConfig
from model.count import depth_flops
from trainer.config import ParallelConfig
from trainer.parallel.orders import chunks_of_rank
from trainer.schedule_config import ScheduleConfig

Sizes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a pipe rank holds. chunks: their numbers; layers: of each. depth: layers of the whole model.

    branches: MTP branches of the model, which come with its last layer.
    """

    chunks: tuple[int, ...]
    layers: tuple[range, ...]
    depth: int
    branches: int

    @property
    def is_first(self) -> bool:
        return self.layers[0].start == 0

    @property
    def is_last(self) -> bool:
        return self.layers[-1].stop == self.depth

    @property
    def is_tied(self) -> bool:
        """Whether another rank holds the embedding, too: MTP embeds tokens behind the last layer."""
        return self.is_first != self.is_last and self.branches > 0

    def uses(self, leaf: str) -> bool:
        """Whether passes here leave a gradient of this name; the MTP branch's uses of shared weights have their own."""
        first, _, rest = leaf.partition(".")
        if first == "layers":
            return any(int(rest.partition(".")[0]) in layers for layers in self.layers)
        return self.is_first if first == "embed" else self.is_last

    def holds(self, parameter: str) -> bool:
        """Whether a parameter or buffer is here."""
        return self.uses(parameter) or (parameter == "embed.weight" and self.is_tied)


def usual_row(schedule: ScheduleConfig) -> int:
    """The row length that stages are balanced for: that of most of the run's tokens, the longer where two are equal."""
    starts = [min(stage.from_tokens, schedule.total_tokens) for stage in schedule.row_length]
    tokens = Counter[int]()
    for stage, (start, end) in zip(schedule.row_length, pairwise([*starts, schedule.total_tokens]), strict=True):
        tokens[stage.value] += end - start
    return max(tokens, key=lambda length: (tokens[length], length))


def chunk_layers(parallel: ParallelConfig, model: ModelConfig, row_length: int) -> tuple[range, ...]:
    """The layers of each chunk of the pipeline, in order; every layer once, each chunk at least one.

    row_length: `usual_row` of the run's schedule, the same on all ranks. `parallel.stages`, if given, decides alone.
    """
    sizes = parallel.stages
    if not sizes:
        flops = depth_flops(model, row_length, "sparse")
        costs = [layer.total for layer in flops.layers]
        costs[-1] += flops.end.total
        sizes = balanced(costs, parallel.pipe, folded=parallel.chunks > parallel.pipe)
    return tuple(range(first, end) for first, end in pairwise(accumulate(sizes, initial=0)))


def layers_of_rank(parallel: ParallelConfig, model: ModelConfig, row_length: int, pipe_rank: int) -> tuple[range, ...]:
    """The layers of a pipe rank's chunk, or of its two, the earlier first."""
    chunks = chunk_layers(parallel, model, row_length)
    return tuple(chunks[chunk] for chunk in chunks_of_rank(parallel.schedule, parallel.pipe, pipe_rank))


def parts(parallel: ParallelConfig, model: ModelConfig, row_length: int) -> tuple[Part, ...]:
    """What each pipe rank holds, in order."""
    return tuple(
        Part(
            chunks=chunks_of_rank(parallel.schedule, parallel.pipe, rank),
            layers=layers_of_rank(parallel, model, row_length, rank),
            depth=model.num_hidden_layers,
            branches=model.num_nextn_predict_layers,
        )
        for rank in range(parallel.pipe)
    )


def balanced(costs: Sequence[int], ranks: int, *, folded: bool) -> Sizes:
    """How many layers each chunk gets. folded: ranks have one chunk from each end, the outer ones first.

    Exact: the dearest rank costs the least that is possible; of those ways, the one with the smallest sum of squares of
    its chunks' costs, which is the most even; of those, the one with the fewest layers in the first chunk that differs.
    """
    total, layers = [0, *accumulate(costs)], len(costs)

    def ways(first: int, end: int, rest: int) -> Iterator[tuple[int, int, int]]:
        """Layers that the first of the ranks left takes from the front and from the back, and their cost."""
        last = rest == 1
        room = end - first - (2 if folded else 1) * (rest - 1)
        for front in range(room if last and not folded else 1, room + (0 if folded else 1)):
            for back in range(room - front if last else 1, room - front + 1) if folded else (0,):
                yield front, back, total[first + front] - total[first] + total[end] - total[end - back]

    @cache
    def least(first: int, end: int, rest: int) -> int:
        """Of the dearest of the ranks that share out these layers."""
        best = total[layers] + 1
        for front, back, cost in ways(first, end, rest):
            if cost < best:
                best = min(best, max(cost, least(first + front, end - back, rest - 1) if rest > 1 else 0))
        return best

    @cache
    def evenest(first: int, end: int, rest: int) -> tuple[int, Sizes] | None:
        """Sum of squares and sizes, None where no way stays below the bound."""
        found: list[tuple[int, Sizes]] = []
        for front, back, cost in ways(first, end, rest):
            if cost <= bound:
                inner = evenest(first + front, end - back, rest - 1) if rest > 1 else (0, ())
                behind = total[end] - total[end - back]
                if inner is not None:
                    squares = (cost - behind) ** 2 + behind**2 + inner[0]
                    found.append((squares, (front, *inner[1], *((back,) if folded else ()))))
        return min(found, default=None)

    bound = least(0, layers, ranks)
    best = evenest(0, layers, ranks)
    assert best is not None
    return best[1]
