"""A run from beginning to end: find or make its folder, build, resume, train, and say how to go on."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, ending, folder, provenance
from trainer.build import Built, build, read_data
from trainer.config import ProfileConfig, TrackingConfig, TrainConfig
from trainer.debug.fault import NonFinite
from trainer.debug.profile import Profiler
from trainer.device import DTYPES, settle
from trainer.folder import FINISHED, Followed, RunFolder
from trainer.guard import Corrupted
from trainer.joined import failed, joined
from trainer.loop import Outlets, run_steps
from trainer.machine import product_rate
from trainer.manifest import CheckpointError
from trainer.observe import Observer
from trainer.parallel.apply import choose_kernels, describe_kernels
from trainer.parallel.placement import SINGLE, Placement
from trainer.parallel.world import World
from trainer.precision import backends
from trainer.precision.recipe import Recipe
from trainer.progress import Progress
from trainer.reader import Reader
from trainer.released import begin as begun
from trainer.stop import Stop, on_signals
from trainer.together import read_together, require_alike
from trainer.tracking import Tracker
from trainer.validate import hold_out
from trainer.writer import Writer

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}
TRAINING_FAILURES = (CheckpointError, Corrupted, FloatingPointError, OverflowError)
"""What ends a run with one line instead of a traceback: disk, memory, or numbers that are no numbers any more."""


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
        """A line for people, from the first process."""
        if self.place.rank == 0:
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
    device = settle(config, place.local_rank)
    with joined(config, place, device) as world:
        found = None if new else _find_unfinished(config, session, world)
        if found is not None:
            return _resume(config, found, session, world, device)
        kernels = _kernels(config, device)
        data = read_together(world, lambda: read_data(config, session.say))
        # Before the folder: what is wrong with the optimizer's groups shows here, and then nothing has been created.
        built = build(config, data, device, world, begins=True)
        facts = _facts(config, device, kernels, data.fingerprint) | begun.facts(config.init)
        require_alike(world, facts)
        made = _make_folder(config, overrides, facts, world)
        world.beat.follow(made.path)
        session.say(f"run {made.path} on {device}, {config.precision.dtype}, {_layout(config)}")
        session.say(f"kernels: {kernels}")
        try:
            session.say(built.table)
            return _run(built, made, facts, None, session)
        finally:
            made.release()


def _find_unfinished(config: TrainConfig, session: Session, world: World) -> RunFolder | None:
    """The unfinished run of this configuration, as the first rank finds it."""
    found = None
    if world.is_first:
        found = folder.find_unfinished(Path(config.runs_dir), config.name, folder.identity(asdict(config)))
    path = world.from_first(None if found is None else found.path)
    if path is None:
        return None
    session.say(f"continuing {path}: the same configuration, not finished (--new starts afresh)")
    return found or Followed(path)


def _make_folder(config: TrainConfig, overrides: Sequence[str], facts: Mapping[str, Any], world: World) -> RunFolder:
    if not world.is_first:
        return Followed(world.from_first(None))
    made = folder.create(Path(config.runs_dir), config.name, asdict(config), overrides, facts, provenance.commit())
    world.from_first(made.path)
    return made


def _layout(config: TrainConfig) -> str:
    size = config.parallel.mesh.size
    threads = f"{config.threads} threads"
    parallel = config.parallel
    stages = f"pipe {parallel.pipe} by {parallel.schedule}, " if parallel.pipe > 1 else ""
    return threads if size == 1 else f"{size} processes ({stages}data {parallel.data}, expert {parallel.expert})"


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
    session = Session(stop_at=stop_at, allow_changes=allow_changes, json=json, place=place)
    device = settle(config, place.local_rank)
    with joined(config, place, device) as world:
        mine = run_folder if world.is_first else Followed(run_folder.path)
        return _resume(config, mine, session, world, device)


def _resume(config: TrainConfig, run_folder: RunFolder, session: Session, world: World, device: torch.device) -> int:
    kernels = _kernels(config, device)
    run_folder.lock()
    try:
        if run_folder.is_finished():
            raise ValueError(f"run = {run_folder.path}: expected an unfinished run, this one is finished")
        world.beat.follow(run_folder.path)
        data = read_together(world, lambda: read_data(config, session.say))
        facts = _facts(config, device, kernels, data.fingerprint)
        if not session.allow_changes:
            require_alike(world, facts)
        changes = _refuse_changes(run_folder.provenance, facts, session)
        saved = checkpoint.recover(run_folder.checkpoints, session.say, world.control)
        if saved is None:
            begun.require_same(config.init, run_folder.provenance)
        built = build(config, data, device, world, begins=saved is None)
        saved_step, more = _restore(built, saved, facts, session)
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
    built: Built, saved: Reader | None, facts: Mapping[str, Any], session: Session
) -> tuple[int | None, list[str]]:
    """The step of the newest checkpoint that verifies, None without one, and what may change the bits after it.

    Its tensors are read one after the other into their places, so that none of them is held besides.
    """
    if saved is None:
        return None, []
    changes = _refuse_changes(saved.state["facts"], facts, session)
    built.restore(saved)
    built.enter(saved.step, anew=saved.state["facts"].get("precision") != facts.get("precision"))
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
    first_step, stop = saved_step or 0, Stop()
    observer = _observer(built)
    outlets = _outlets(built, run_folder, facts, session)
    kind = "start" if saved_step is None else "resume"
    run_folder.begin(kind, first_step, _about(observer, first_step, facts), changes)
    try:
        with on_signals(stop), closing(outlets.writer), closing(outlets.profiler):
            done = run_steps(built, outlets, observer, first_step, stop, session.stop_at)
    except NonFinite as error:
        failed(built.parts.world.beat, error)
        ending.keep_fault(built, run_folder, error.fault, facts)
        return 1
    except BaseException as error:
        if not failed(built.parts.world.beat, error):
            run_folder.end(f"{type(error).__name__}: {error}", run_folder.done)
        if isinstance(error, TRAINING_FAILURES):
            ending.tell_failure(error, run_folder)
            return 1
        raise
    finally:
        outlets.tracker.close()
    if done < len(built.plans):
        reason = stop.reason or f"stop at step {session.stop_at}"
        run_folder.end(reason, done)
        session.say(f"stopped after step {done} ({reason}), saved. To go on: {ending.command('resume', run_folder)}")
        return EXIT_CODES.get(reason, 0)
    results = ending.finish(built, run_folder, observer.held_out, session.say)
    run_folder.end(FINISHED, done, results)
    return 0


def _observer(built: Built) -> Observer:
    config, parts = built.config, built.parts
    rate = product_rate(parts.pool, parts.device, DTYPES[config.precision.dtype])
    return Observer(
        built=built,
        held_out=hold_out(built.data, config.validation.rows),
        product_rate=parts.world.totals({"rate": [rate]})["rate"],
    )


def _outlets(built: Built, run_folder: RunFolder, facts: Mapping[str, Any], session: Session) -> Outlets:
    """Where the results go; on ranks other than the first nowhere, but for their part of the checkpoints."""
    config, world = built.config, built.parts.world
    shown = config if world.is_first else replace(config, tracking=TrackingConfig(wandb="off"), profile=ProfileConfig())
    keep_last, keep_every = config.checkpoint.keep_last, config.checkpoint.keep_every_steps
    progress = Progress(len(built.plans), _total_tokens(built), as_json=session.json)
    return Outlets(
        folder=run_folder,
        writer=Writer(run_folder.checkpoints, keep_last, keep_every, world.saving),
        tracker=Tracker(run_folder.path, shown.tracking, asdict(config), run_folder.run_id, progress.say),
        progress=progress if world.is_first else None,
        profiler=Profiler(replace(built, config=shown), run_folder.path, progress.say),
        facts=facts,
    )


def _about(observer: Observer, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's history keeps of a session besides what has changed."""
    built, commit = observer.built, provenance.commit()
    return {
        "tokens": built.plans[step].tokens if step < len(built.plans) else _total_tokens(built),
        "product_flops_per_s": observer.product_rate,
        "facts": {**facts, "commit": commit.commit, "dirty": commit.dirty},
    }


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


def _facts(config: TrainConfig, device: torch.device, kernels: str, data_fingerprint: str) -> dict[str, Any]:
    parallel = config.parallel
    layout = {key: value for key, value in asdict(parallel).items() if key != "check_every_steps"}
    reduction = "exact" if parallel.reduction == "exact" else f"fast: {layout}"
    facts = provenance.facts(device=str(device), dtype=config.precision.dtype, kernels=kernels, reduction=reduction)
    recipe = Recipe(config.precision, config.model)
    precision = {} if recipe.is_plain else {"precision": recipe.hash()}
    return facts | precision | {"data_fingerprint": data_fingerprint}


def _kernels(config: TrainConfig, device: torch.device) -> str:
    """What serves in place of plain functions, and who multiplies numbers with formats if there are any."""
    kernels, recipe = describe_kernels(choose_kernels(config, device)), Recipe(config.precision, config.model)
    if recipe.is_plain:
        return kernels
    backend = backends.of_run(config.precision, recipe, device)
    return f"{kernels}; formats: {backends.describe(backend)}"


def _total_tokens(built: Built) -> int:
    last = built.plans[len(built.plans) - 1]
    return last.tokens + last.rows * last.row_length
