"""A run from beginning to end: find or make its folder, build, resume, train, and say how to go on."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import checkpoint, folder, provenance
from trainer.build import Built, attention_after, build, read_data
from trainer.config import TrainConfig
from trainer.debug import crash
from trainer.debug.crash import Kept
from trainer.debug.fault import NonFinite
from trainer.debug.profile import Profiler
from trainer.device import DTYPES, settle
from trainer.folder import FINISHED, RunFolder
from trainer.loop import Outlets, run_steps
from trainer.machine import product_rate
from trainer.manifest import CheckpointError
from trainer.observe import Observer
from trainer.parallel.apply import choose_kernels, describe_kernels
from trainer.parallel.placement import SINGLE, Placement
from trainer.progress import Progress
from trainer.sample import generate
from trainer.stop import Stop, on_signals
from trainer.tracking import Tracker
from trainer.validate import HeldOut, hold_out
from trainer.writer import Writer

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}
TRAINING_FAILURES = (CheckpointError, FloatingPointError, OverflowError)
"""What ends a run with one line instead of a traceback: the disk, or numbers that are no numbers any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """How one process works on a run: nothing here changes what the run computes.

    stop_at: stop before the step of this number, as if asked to. allow_changes: resume although something that decides
    the bits differs. json: progress as JSON lines on standard output. place: which of the run's processes this is.
    """

    stop_at: int = sys.maxsize
    allow_changes: bool = False
    json: bool = False
    place: Placement = SINGLE

    def say(self, text: str) -> None:
        """A line for people."""
        print(text, file=sys.stderr if self.json else sys.stdout, flush=True)


def train(
    config: TrainConfig,
    *,
    new: bool = False,
    overrides: Sequence[str] = (),
    stop_at: int = sys.maxsize,
    allow_changes: bool = False,
    json: bool = False,
    place: Placement = SINGLE,
) -> int:
    """Continue the unfinished run of exactly this configuration, or start one; returns the exit code.

    new: start afresh in any case. overrides: what the user typed, kept beside the run. The others: see `Session`.
    Raises ValueError for what the user can mend.
    """
    session = Session(stop_at=stop_at, allow_changes=allow_changes, json=json, place=place)
    found = None
    if not new:
        identity = folder.identity(asdict(config))
        found = folder.find_unfinished(Path(config.runs_dir), config.name, identity)
    if found is not None:
        session.say(f"continuing {found.path}: the same configuration, not finished (--new starts afresh)")
        return _resume(config, found, session)
    device = settle(config)
    kernels = describe_kernels(choose_kernels(config, device))
    data = read_data(config, session.say)
    # Before the folder: what is wrong with the optimizer's groups shows here, and then nothing has been created.
    built = build(config, data, device)
    facts = _facts(config, str(device), kernels, data.fingerprint)
    made = folder.create(Path(config.runs_dir), config.name, asdict(config), overrides, facts, provenance.commit())
    session.say(f"run {made.path} on {device}, {config.precision.dtype}, {config.threads} threads")
    session.say(f"kernels: {kernels}")
    try:
        session.say(built.table)
        return _run(built, made, facts, None, session)
    finally:
        made.release()


def resume(
    config: TrainConfig,
    run_folder: RunFolder,
    *,
    stop_at: int = sys.maxsize,
    allow_changes: bool = False,
    json: bool = False,
    place: Placement = SINGLE,
) -> int:
    """Go on from the newest checkpoint that verifies, or from the beginning where there is none; see `train`."""
    return _resume(config, run_folder, Session(stop_at=stop_at, allow_changes=allow_changes, json=json, place=place))


def _resume(config: TrainConfig, run_folder: RunFolder, session: Session) -> int:
    device = settle(config)
    kernels = describe_kernels(choose_kernels(config, device))
    run_folder.lock()
    try:
        if run_folder.is_finished():
            raise ValueError(f"run = {run_folder.path}: expected an unfinished run, this one is finished")
        data = read_data(config, session.say)
        facts = _facts(config, str(device), kernels, data.fingerprint)
        changes = _refuse_changes(run_folder.provenance, facts, session)
        built = build(config, data, device)
        saved_step, more = _restore(built, run_folder, facts, session)
        changes = list(dict.fromkeys([*changes, *more]))
        for change in changes:
            session.say(f"bit-equality is off from here on: {change}")
        session.say(f"run {run_folder.path}: going on after step {saved_step or 0} of {len(built.plans)}")
        session.say(f"kernels: {kernels}")
        changes = [*run_folder.changed_keys(asdict(config)), *changes]
        return _run(built, run_folder, facts, saved_step, session, changes)
    finally:
        run_folder.release()


def _restore(
    built: Built, run_folder: RunFolder, facts: Mapping[str, Any], session: Session
) -> tuple[int | None, list[str]]:
    """The step of the newest checkpoint that verifies, None without one, and what may change the bits after it.

    Its tensors are read one after the other into their places, so that none of them is held besides.
    """
    saved = checkpoint.recover(run_folder.checkpoints, session.say)
    if saved is None:
        return None, []
    changes = _refuse_changes(saved.state["facts"], facts, session)
    built.restore(saved)
    return saved.step, changes


def _run(
    built: Built,
    run_folder: RunFolder,
    facts: Mapping[str, Any],
    saved_step: int | None,
    session: Session,
    changes: Sequence[str] = (),
) -> int:
    """saved_step: of the checkpoint that was restored."""
    config, parts, first_step = built.config, built.parts, saved_step or 0
    observer = Observer(
        built=built,
        held_out=hold_out(built.data, config.validation.rows),
        product_rate=product_rate(parts.pool, parts.device, DTYPES[config.precision.dtype]),
    )
    progress = Progress(len(built.plans), _total_tokens(built), as_json=session.json)
    outlets = Outlets(
        folder=run_folder,
        writer=Writer(run_folder.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_every_steps),
        tracker=Tracker(run_folder.path, config.tracking, asdict(config), run_folder.run_id, progress.say),
        progress=progress,
        profiler=Profiler(built, run_folder.path, progress.say),
        facts=facts,
    )
    kind = "start" if saved_step is None else "resume"
    run_folder.begin(kind, first_step, _about(observer, first_step, facts), changes)
    stop = Stop()
    try:
        with on_signals(stop), closing(outlets.writer), closing(outlets.profiler):
            done = run_steps(built, outlets, observer, first_step, stop, session.stop_at)
    except NonFinite as error:
        kept = crash.keep(built, run_folder, error.fault, facts)
        run_folder.end(f"NonFinite: {kept.line}", run_folder.done)
        _tell(kept, run_folder)
        return 1
    except BaseException as error:
        run_folder.end(f"{type(error).__name__}: {error}", run_folder.done)
        if isinstance(error, TRAINING_FAILURES):
            print(f"keel: error: {error}", file=sys.stderr)
            print(f"the last checkpoint is kept; to go on from it: {_command('resume', run_folder)}", file=sys.stderr)
            return 1
        raise
    finally:
        outlets.tracker.close()
    if done < len(built.plans):
        reason = stop.reason or f"stop at step {session.stop_at}"
        run_folder.end(reason, done)
        progress.say(f"stopped after step {done} ({reason}), saved. To go on: {_command('resume', run_folder)}")
        return EXIT_CODES.get(reason, 0)
    results = _finish(built, run_folder, observer.held_out, progress)
    run_folder.end(FINISHED, done, results)
    return 0


def _about(observer: Observer, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's history keeps of a session besides what has changed."""
    built, commit = observer.built, provenance.commit()
    return {
        "tokens": built.plans[step].tokens if step < len(built.plans) else _total_tokens(built),
        "product_flops_per_s": observer.product_rate,
        "facts": {**facts, "commit": commit.commit, "dirty": commit.dirty},
    }


def _tell(kept: Kept, run_folder: RunFolder) -> None:
    print(f"keel: error: {kept.line}", file=sys.stderr)
    if kept.path is None:
        print(f"the crash folder could not be written: {kept.trouble}", file=sys.stderr)
    else:
        size = f"{crash.size_bytes(kept.path) / 1e6:.1f} MB"
        command = f"./keel train --replay {shlex.quote(str(kept.path))}"
        print(f"crash folder: {kept.path} ({size}); to compute that row again: {command}", file=sys.stderr)
    print(f"the last checkpoint is kept; to go on from it: {_command('resume', run_folder)}", file=sys.stderr)


def _finish(built: Built, run_folder: RunFolder, held_out: HeldOut, progress: Progress) -> dict[str, float]:
    """Says what became of the run and how to look at it; returns what is measured only now."""
    results = {}
    config, say = built.config, progress.say
    mode = attention_after(config.schedule, len(built.plans))
    final = held_out.measure(built.parts.pool, mode)
    say(f"held-out loss {final['validation/loss']:.4f} nats, {final['validation/bits_per_byte']:.4f} bits per byte")
    if config.validation.bigram:
        bar = held_out.bigram(built.data)
        say(f"a bigram model of all {bar.tokens} training tokens: {bar.loss:.4f} nats on the same targets")
        results = {"bigram/loss": bar.loss, "bigram/tokens": bar.tokens}
    prompts = [config.sample.prompt]
    pieces = generate(built.parts.model, built.data.tokenizer, prompts, config.sample, mode, config.seed)
    text = "".join(piece.text for piece in pieces)
    (run_folder.path / "samples" / f"step-{len(built.plans):06}.txt").write_text(text)
    say("\n".join(["sample:", *("    " + line for line in text.splitlines())]))
    say(f"its report:      {_command('report', run_folder)}")
    say(f"another sample:  {_command('sample', run_folder)}")
    say(f"its curves:      wandb leet {shlex.quote(str(run_folder.path / 'wandb'))}")
    return results


def _refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], session: Session) -> list[str]:
    """What differs and may change the bits, where that is allowed; else ValueError."""
    differences = provenance.compare(saved, now)
    if saved.get("data_fingerprint") != now["data_fingerprint"]:
        differences.append("the training data or the tokenizer differ")
    if differences and not session.allow_changes:
        raise ValueError(
            f"resume = {'; '.join(differences)}: expected the same, or --allow-changes, which gives up bit-equality"
        )
    return differences


def _facts(config: TrainConfig, device: str, kernels: str, data_fingerprint: str) -> dict[str, Any]:
    facts = provenance.facts(device=device, dtype=config.precision.dtype, kernels=kernels)
    return facts | {"data_fingerprint": data_fingerprint}


def _total_tokens(built: Built) -> int:
    last = built.plans[len(built.plans) - 1]
    return last.tokens + last.rows * last.row_length


def _command(verb: str, run_folder: RunFolder) -> str:
    return f"./keel {verb} {shlex.quote(str(run_folder.path))}"
