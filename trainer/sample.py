"""Text from a model by plain full forwards: every new token runs the whole row again."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.config import AttentionMode
from model.transformer import Transformer
from trainer import checkpoint
from trainer.build import attention_after, build_model, read_data, restore_model
from trainer.config import SampleConfig, TrainConfig
from trainer.device import settle
from trainer.folder import RunFolder


def sample_run(config: TrainConfig, run_folder: RunFolder, *, seed: int) -> Iterator[str]:
    """Yield text from a run's newest checkpoint that verifies; ValueError where there is none."""
    device = settle(config)
    found = checkpoint.newest_valid(run_folder.checkpoints, lambda line: None)
    if found is None:
        raise ValueError(f"run = {run_folder.path}: expected a run with a checkpoint, this one has none yet")
    data = read_data(config, lambda line: None)
    model = build_model(config, device)
    restore_model(model, found[1].tensors)
    yield from generate(model, data.tokenizer, config.sample, attention_after(config.schedule, found[1].step), seed)


@torch.no_grad()
def generate(
    model: Transformer, tokenizer: Tokenizer, config: SampleConfig, mode: AttentionMode, seed: int
) -> Iterator[str]:
    """Yield the prompt, then pieces of text as they are drawn; ends at the end-of-document token.

    Each draw is a function of (seed, index of the token), so the same call gives the same text. A piece may be empty
    while a character of several bytes is incomplete. Like every document, the row begins with the bos token.
    """
    device = model.embed.weight.device
    ids = [tokenizer.bos_id, *(int(token) for token in tokenizer.encode(config.prompt))]
    told = tokenizer.decode(ids[1:])
    yield told
    for index in range(config.tokens):
        output = model(torch.tensor([ids], device=device), mode=mode)
        logits_V = model.logits(output.h_BTD[:, -1:])[0, 0, : tokenizer.vocab_size]
        ids.append(draw(logits_V, config.temperature, config.top_p, uniform(seed, index)))
        if ids[-1] == tokenizer.eos_id:
            return
        text = tokenizer.decode(ids[1:])
        if not text.endswith("\ufffd"):
            yield text[len(told) :]
            told = text


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


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from (seed, purpose, index)."""
    digest = hashlib.blake2b(f"{seed}/sample/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
