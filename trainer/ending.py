"""How a session of a run ends: what it says to the user, and the lines to go on with."""

import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from model.config import AttentionMode
from trainer.build import Built, attention_after
from trainer.debug import crash
from trainer.debug.crash import Kept
from trainer.debug.fault import Fault, NonFinite
from trainer.folder import RunFolder
from trainer.sample import generate
from trainer.validate import HeldOut


def keep_fault(built: Built, run_folder: RunFolder, fault: Fault, facts: Mapping[str, Any]) -> None:
    """Keep what computing a row that is at fault again takes, where this rank has the whole model, and say so."""
    world = built.parts.world
    if not world.is_first:
        return
    if world.expert.size == world.mesh.pipe == 1:
        kept = crash.keep(built, run_folder, fault, facts)
    else:
        what, key, size = ("layers", "pipe", world.mesh.pipe) if world.mesh.pipe > 1 else ("experts", "expert", 0)
        trouble = f"the {what} are shared out over {size or world.expert.size} ranks; parallel.{key}=1 keeps it"
        kept = Kept(line=str(NonFinite(fault)), path=None, trouble=trouble)
    run_folder.end(f"NonFinite: {kept.line}", run_folder.done)
    print(f"keel: error: {kept.line}", file=sys.stderr)
    if kept.path is None:
        print(f"the crash folder could not be written: {kept.trouble}", file=sys.stderr)
    else:
        size = f"{crash.size_bytes(kept.path) / 1e6:.1f} MB"
        replay = f"./keel train --replay {shlex.quote(str(kept.path))}"
        print(f"crash folder: {kept.path} ({size}); to compute that row again: {replay}", file=sys.stderr)
    _tell_how_to_go_on(run_folder)


def tell_failure(error: BaseException, run_folder: RunFolder) -> None:
    """One line of what ended the run, and how to go on."""
    print(f"keel: error: {error}", file=sys.stderr)
    _tell_how_to_go_on(run_folder)


def _tell_how_to_go_on(run_folder: RunFolder) -> None:
    print(f"the last checkpoint is kept; to go on from it: {command('resume', run_folder)}", file=sys.stderr)


def finish(built: Built, run_folder: RunFolder, held_out: HeldOut, say: Callable[[str], None]) -> dict[str, float]:
    """Says what became of the run and how to look at it; returns what is measured only now. All ranks call it."""
    results = {}
    config, world = built.config, built.parts.world
    mode = attention_after(config.schedule, len(built.plans))
    final = held_out.measure(built.parts.pool, mode, world, built.parts.pipeline)
    world.beat.mark("ending", row=None)
    # Before what the first rank does alone, and for which the others would wait.
    text = _sample(built, mode)
    say(f"held-out loss {final['validation/loss']:.4f} nats, {final['validation/bits_per_byte']:.4f} bits per byte")
    if config.validation.bigram and world.is_first:
        bar = held_out.bigram(built.data)
        say(f"a bigram model of all {bar.tokens} training tokens: {bar.loss:.4f} nats on the same targets")
        results = {"bigram/loss": bar.loss, "bigram/tokens": bar.tokens}
    if world.is_first:
        (run_folder.path / "samples" / f"step-{len(built.plans):06}.txt").write_text(text)
    say("\n".join(["sample:", *("    " + line for line in text.splitlines())]))
    say(f"its report:      {command('report', run_folder)}")
    say(f"another sample:  {command('sample', run_folder)}")
    say(f"its curves:      wandb leet {shlex.quote(str(run_folder.path / 'wandb'))}")
    return results


def _sample(built: Built, mode: AttentionMode) -> str:
    """A text from the model. Ranks that share out its layers or experts all write it: each token needs all of them."""
    parts, config = built.parts, built.config
    if parts.world.place.data > 0 and parts.world.expert.size == 1:
        return ""
    prompts = [config.sample.prompt]
    pieces = generate(parts.model, built.data.tokenizer, prompts, config.sample, mode, config.seed)
    return "".join(piece.text for piece in pieces)


def command(verb: str, run_folder: RunFolder) -> str:
    """The command line of a verb for this run."""
    return f"./keel {verb} {shlex.quote(str(run_folder.path))}"
