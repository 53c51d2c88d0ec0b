"""What a person sees while a run goes on: a heading, a line every so often, a live line on a terminal."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from trainer import journal

LINES = 40
"""A run prints about this many permanent lines, whatever its length."""


class Progress:
    """Lines about training on a stream; the live line appears only on a terminal."""

    def __init__(
        self, total_steps: int, total_tokens: int, stream: TextIO | None = None, *, as_json: bool = False
    ) -> None:
        """stream: standard output where none is given. as_json: steps as JSON lines, the rest on standard error."""
        self._json = as_json
        self._begun: tuple[float, int] | None = None
        self._steps, self._tokens, self._stream = total_steps, total_tokens, stream or sys.stdout
        self._every = max(1, total_steps // LINES)
        self._live = self._stream.isatty()

    def say(self, text: str) -> None:
        """A permanent line."""
        if self._json:
            print(text, file=sys.stderr, flush=True)
            return
        self._stream.write(("\r\033[K" if self._live else "") + text + "\n")
        self._stream.flush()

    def step(self, row: Mapping[str, Any]) -> None:
        """One finished step; permanent every few steps and when it carries a validation, live otherwise."""
        if self._json:
            print(journal.as_line(row), file=self._stream, flush=True)
            return
        text = self._line(row)
        if row["step"] % self._every == 0 or "validation/loss" in row or row["step"] == self._steps:
            self.say(text)
        elif self._live:
            self._stream.write("\r\033[K" + text)
            self._stream.flush()

    def _line(self, row: Mapping[str, Any]) -> str:
        left_s = self._left_s(row)
        parts = [
            f"step {row['step']:>{len(str(self._steps))}}/{self._steps}",
            f"tokens {_short(row['tokens'])}",
            f"loss {row['loss/lm']:.3f}",
            *([f"mtp {row['loss/mtp']:.3f}"] if "loss/mtp" in row else []),
            *([f"indexer {row['loss/indexer']:.3f}"] if "loss/indexer" in row else []),
            f"load {row['router/load_max_ratio']:.2f}" if "router/load_max_ratio" in row else "",
            f"rate {row['schedule/rate']:.1e}",
            f"norm {row['optim/grad_norm']:.2f}",
            f"{_short(row['speed/tokens_per_s'])} tok/s",
            f"left {_clock(left_s)}",
        ]
        if "validation/loss" in row:
            parts.append(
                f"| held out {row['validation/loss']:.3f} nats {row['validation/bits_per_byte']:.3f} bits/byte"
            )
        if "indexer/recall" in row:
            parts.append(f"recall {row['indexer/recall']:.2f}")
        return "  ".join(part for part in parts if part)

    def _left_s(self, row: Mapping[str, Any]) -> float:
        """Seconds left at the speed since this process began, validation and saving included."""
        if self._begun is None:
            size = row["schedule/rows"] * row["schedule/row_length"]
            self._begun = (row["time/run_s"] - row["time/step_s"], row["tokens"] - size)
        run_s, tokens = row["time/run_s"] - self._begun[0], row["tokens"] - self._begun[1]
        return (self._tokens - row["tokens"]) * run_s / tokens


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
