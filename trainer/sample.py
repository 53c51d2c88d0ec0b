"""Text from a model, token by token from the compressed cache: one prompt or a batch of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.cache import Cache
from model.config import AttentionMode
from model.decode import prefill, step
from model.transformer import Transformer
from trainer import checkpoint, schedule
from trainer.build import attention_after, build_model, read_data, restore_model
from trainer.config import SampleConfig, TrainConfig
from trainer.device import settle
from trainer.folder import RunFolder
from trainer.manifest import CheckpointError
from trainer.precision.serving import serve
from trainer.reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of the text of one row; rows count the prompts from 0. last: the row's document has ended."""

    row: int
    text: str
    last: bool = False


def sample_run(
    config: TrainConfig,
    run_folder: RunFolder,
    prompts: Sequence[str],
    sampling: SampleConfig,
    *,
    seed: int,
    at_step: int | None = None,
) -> tuple[int, Iterator[Piece]]:
    """The step of the checkpoint that writes, and `generate` from it: of `at_step`, else the newest that verifies.

    Raises ValueError where there is none or it is damaged.
    """
    device = settle(config)
    saved = open_checkpoint(run_folder, at_step)
    data = read_data(config, lambda line: None)
    model = build_model(config, device)
    restore_model(model, saved)
    plans = schedule.plan(config.schedule)
    serve(model, config.precision, schedule.after(plans[saved.step - 1]) if saved.step else 0)
    mode = attention_after(config.schedule, saved.step)
    return saved.step, generate(model, data.tokenizer, prompts, sampling, mode, seed)


def open_checkpoint(run_folder: RunFolder, at_step: int | None) -> Reader:
    """The run's checkpoint of this step, else the newest that verifies; ValueError where there is none."""
    if at_step is None:
        found = checkpoint.newest_valid(run_folder.checkpoints, lambda line: None)
        if found is None:
            raise ValueError(f"run = {run_folder.path}: expected a run with a checkpoint, this one has none yet")
        return found
    there = checkpoint.steps(run_folder.checkpoints)
    if at_step not in there:
        raise ValueError(f"--step = {at_step}: expected one of {', '.join(map(str, there)) or 'none yet'}")
    try:
        saved = Reader(there[at_step])
        saved.verify()
    except CheckpointError as error:
        raise ValueError(f"--step = {at_step}: expected a checkpoint that verifies: {error}") from error
    return saved


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SampleConfig,
    mode: AttentionMode,
    seed: int,
) -> Iterator[Piece]:
    """Yield each row's prompt, then pieces of its text as they are drawn, to the end-of-document token or `tokens`.

    Each draw is a function of (seed, row, index of the token), so the same call gives the same text. A piece is held
    back while a character of several bytes is incomplete. Like every document, a row begins with the bos token.
    Raises ValueError where prompt and text do not fit into max_position_embeddings.
    """
    rows = [[tokenizer.bos_id, *(int(token) for token in tokenizer.encode(prompt))] for prompt in prompts]
    lengths, device = [len(ids) for ids in rows], model.device
    padded = [ids + [tokenizer.bos_id] * (max(lengths) - len(ids)) for ids in rows]
    limit = max(lengths) + max(config.tokens, 1) - 1
    begun = prefill(model, torch.tensor(padded, device=device), lengths, limit=limit, mode=mode)
    yield from (Piece(row=row, text=tokenizer.decode(ids[1:])) for row, ids in enumerate(rows))
    writing, untold = set(range(len(rows))), [list[int]() for _ in rows]
    for drawn in _draws(model, *begun, tokenizer.vocab_size, config, seed):
        for row in sorted(writing):
            if drawn[row] == tokenizer.eos_id:
                writing.remove(row)
                yield Piece(row=row, text="", last=True)
                continue
            untold[row].append(drawn[row])
            # The tokenizer keeps every byte, so that a text may be told apart wherever no character is cut.
            text = tokenizer.decode(untold[row])
            if not text.endswith("\ufffd"):
                untold[row].clear()
                yield Piece(row=row, text=text)
        if not writing:
            return


def _draws(
    model: Transformer, cache: Cache, logits_BV: Tensor, known: int, config: SampleConfig, seed: int
) -> Iterator[list[int]]:
    """Draw `tokens` times an id for every row, of the `known` ids that the tokenizer has."""
    for index in range(config.tokens):
        drawn = [
            draw(logits_V[:known], config.temperature, config.top_p, uniform(seed, row, index))
            for row, logits_V in enumerate(logits_BV)
        ]
        yield drawn
        if index + 1 < config.tokens:
            logits_BV = step(model, cache, torch.tensor(drawn, device=logits_BV.device))


def draw(logits_V: Tensor, temperature: float, top_p: float, uniform_01: float) -> int:
    """One id: the likeliest at temperature 0, else the first whose cumulated probability exceeds the uniform number.

    top_p keeps the likeliest ids until their probabilities sum to at least top_p.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    probability_V, id_V = torch.softmax(logits_V.double() / temperature, -1).sort(descending=True, stable=True)
    before_V = probability_V.cumsum(-1) - probability_V
    kept_V = torch.where(before_V < top_p, probability_V, 0)
    total_V = kept_V.cumsum(-1)
    chosen = int((total_V <= uniform_01 * total_V[-1]).sum())
    return int(id_V[min(chosen, int((kept_V > 0).sum()) - 1)])


def uniform(seed: int, row: int, index: int) -> float:
    """A number in [0, 1) from (seed, purpose, row of the batch, index of the token)."""
    digest = hashlib.blake2b(f"{seed}/sample/{row}/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
