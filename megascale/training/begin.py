"""A run on one rank: everything it needs is built, and put where its checkpoint left it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from megascale.checkpoint.emergency import Emergency
from megascale.checkpoint.folder import checkpoints_dir, go_on_from
from megascale.checkpoint.load import (
    Found,
    begin_from,
    find,
    newest_step,
    restore,
)
from megascale.checkpoint.save import Saver
from megascale.config import RunConfig, parse_config
from megascale.corpus.batches import Cursor, with_stages
from megascale.corpus.run_length import is_over, run_length
from megascale.corpus.sources import SourceInfo, identity, training_documents
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.build import build_model
from megascale.monitor.speeds import RankSpeeds
from megascale.optim.build import build_optimizer
from megascale.planner.service.ahead import PlansAhead
from megascale.run.describe import describe_run
from megascale.run.earlier_runs import places_told
from megascale.run.folder import RunFolder
from megascale.run.origin import LINEAGE, keep_of_import
from megascale.run.resolve import ResolvedRun
from megascale.run.resume import compare_configs, compare_sources, softmax_changes
from megascale.run.start import Start, find_start, taken_over
from megascale.run.step_problem import batches_of, plan_lengths, step_problem
from megascale.run.warnings import cuda_warnings
from megascale.runtime.distributed import (
    Ranks,
    cores_are_shared,
    gather_arrays,
    node_names,
)
from megascale.runtime.first_rank import on_first_rank
from megascale.runtime.signals import StopRequest
from megascale.training.evaluate import HeldoutSet, heldout_sets
from megascale.training.feed import Feed
from megascale.training.reading import reader_of
from megascale.training.recorder import Recorder
from megascale.training.spikes import SpikeWatch
from megascale.training.step import Learner


@dataclass
class Run:
    """A run in progress, on one rank."""

    config: RunConfig
    sources: Mapping[str, SourceInfo]
    learner: Learner
    feed: Feed
    reader: MicroBatchReader
    heldout: Mapping[str, HeldoutSet]
    saver: Saver
    recorder: Recorder
    stop_request: StopRequest
    cursor: Cursor
    spikes: SpikeWatch
    speeds: RankSpeeds | None = None
    """On rank 0, where plans are to count with them."""
    stopped: bool = False
    """Some rank was asked to stop, and all ranks have."""
    skipped_in_a_row: int = 0
    failed_saves: int = 0
    """In a row."""
    save_again_at: int | None = None
    """Step after which a failed save is tried again."""
    save_waits: bool = False
    """A checkpoint is due, and is written once the loss is settled."""

    @property
    def is_over(self) -> bool:
        """Whether its last step is done."""
        return is_over(self.cursor, self.config.train)


def identities(sources: Mapping[str, SourceInfo]) -> dict[str, str]:
    """What each source must still be when a run is resumed; see `corpus.sources.identity`."""
    return {name: identity(info) for name, info in sources.items()}


def begin(
    resolved: ResolvedRun,
    ranks: Ranks,
    folder: RunFolder,
    plans: PlansAhead | None,
    resume: str | None,
    stop: StopRequest,
) -> Run:
    """Build everything a run needs, and put it where its checkpoint left it."""
    config, sources, start = resolved
    model = build_model(config, ranks)
    learner = Learner(config, ranks, model, build_optimizer(config, model))
    spikes, speeds = SpikeWatch(config.train.spikes), _rank_speeds(config, ranks)
    saver = Saver(
        folder.path, config.checkpoint, ranks, _emergency(folder.path, config, ranks, resume)
    )
    cursor, notes = _restore(learner, resolved, folder, resume, spikes, speeds, saver.emergency)
    if config.device == "auto" and ranks.device.type == "cuda":  # else the description has them
        notes = [*notes, *cuda_warnings(config)]
    batches = batches_of(config, sources)
    feed = Feed(
        batches,
        partial(step_problem, config, ranks.layout),
        ranks,
        plans,
        config.planner.ahead_steps,
        partial(is_over, train=config.train),
        *([speeds.at] if speeds is not None else []),
    )
    saver.prepare(model, learner.optimizer)
    length = run_length(batches, config.train.tokens, cursor)
    nodes, shared = node_names(ranks), cores_are_shared(ranks)
    make_recorder = partial(Recorder, config, ranks, folder, sources, cursor, length, nodes, shared)
    recorder = on_first_rank(ranks, make_recorder) or make_recorder()  # it writes on rank 0 only
    description = on_first_rank(ranks, lambda: describe_run(resolved, ranks.layout))
    recorder.started(cursor, description or "", notes)
    heldout = heldout_sets(learner, sources, partial(plan_lengths, config, ranks.layout))
    recorder.heldout({name: one.part for name, one in heldout.items()})
    return Run(
        config=config,
        sources=sources,
        learner=learner,
        feed=feed,
        reader=reader_of(config, ranks, token_sources(config, sources)),
        heldout=heldout,
        saver=saver,
        recorder=recorder,
        stop_request=stop,
        cursor=cursor,
        spikes=spikes,
        speeds=speeds,
    )


def token_sources(config: RunConfig, sources: Mapping[str, SourceInfo]) -> list[TokenSource]:
    """The training shards of a run as ranks read them, in the order of `GlobalBatch.source`."""
    vocab_size = config.model.vocab_size or 0
    return [
        TokenSource(
            name, training_documents(one, sources[name]), sources[name].first_id, vocab_size
        )
        for name, one in config.data.sources.items()
    ]


def _emergency(
    run_dir: Path, config: RunConfig, ranks: Ranks, resume: str | None
) -> Emergency | None:
    directory = config.checkpoint.emergency_dir
    if directory is None:
        return None
    on_first_rank(ranks, lambda: checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True))
    return Emergency(run_dir, directory, ranks, anew=resume not in ("auto", "latest"))


def _rank_speeds(config: RunConfig, ranks: Ranks) -> RankSpeeds | None:
    """What plans count with, where they are to; on rank 0, which alone has them made."""
    if config.planner.rank_speeds == "equal":
        return None
    places = gather_arrays(np.array([ranks.hdp_rank]), ranks)
    return None if places is None else RankSpeeds(places[:, 0].tolist(), config.planner.ahead_steps)


def _restore(
    learner: Learner,
    run: ResolvedRun,
    folder: RunFolder,
    resume: str | None,
    spikes: SpikeWatch,
    speeds: RankSpeeds | None,
    emergency: Emergency | None,
) -> tuple[Cursor, list[str]]:
    """Load the checkpoint to continue from; (its cursor, what the user should know)."""
    if resume is None:
        return _start(learner, run.start, folder)
    found, warnings = _find(folder.path, resume, learner.ranks, emergency)
    if emergency is not None:
        emergency.forget_after(-1 if found is None else found.manifest.position.step)
    if found is None:
        return _start(learner, run.start, folder)
    position = found.manifest.position
    cursor = Cursor.from_json(position.cursor["data"])
    changed = compare_configs(position.config, learner.config, position.tokens_seen)
    was = parse_config(position.config).data.stages
    cursor, left = with_stages(cursor, was, learner.config.data.stages), cursor
    compare_sources(position.cursor["sources"], identities(run.sources))
    restore(found, learner.model, learner.optimizer, learner.ranks)
    spikes.go_on(position.cursor["spikes"])
    if cursor is not left:
        spikes.begin_anew()  # another blend has other losses
    if speeds is not None and not speeds.go_on(position.cursor.get("speeds")):
        changed = [*changed, "number of ranks, whose speeds are measured anew"]
    # whoever went back to a step means it: a crash before the next save must not undo that
    checkpoints = checkpoints_dir(folder.path)
    if found.bring is None:
        on_first_rank(learner.ranks, lambda: go_on_from(checkpoints, position.step))
    notes = [*warnings, *(f"changed since the checkpoint: {line}" for line in changed)]
    notes += [*softmax_changes(found, learner.config), *_end_reached(cursor, learner.config)]
    return cursor, notes


def _end_reached(cursor: Cursor, config: RunConfig) -> Iterator[str]:
    """That a run is over which may have been meant to go on."""
    if cursor.tokens_seen >= config.train.tokens:
        yield (
            f"nothing is left to train: the checkpoint of step {cursor.step} has seen "
            f"{cursor.tokens_seen:,} tokens, and train.tokens = {config.train.tokens:,}"
        )


def _find(
    run_dir: Path, resume: str, ranks: Ranks, emergency: Emergency | None
) -> tuple[Found | None, list[str]]:
    """The checkpoint to continue from, or the emergency copy that is newer; what is wrong."""
    warnings: list[str] = []
    if emergency is not None and resume in ("auto", "latest"):
        found, warnings = emergency.find(newest_step(run_dir, ranks))
        if found is not None:
            step = found.manifest.position.step
            return found, [*warnings, f"goes on from the emergency copy of step {step}"]
    which: Literal["auto", "latest"] | int
    which = "auto" if resume == "auto" else "latest" if resume == "latest" else int(resume)
    found = find(run_dir, which, ranks)
    return found, [*warnings, *(found.warnings if found is not None else ())]


def _start(learner: Learner, start: Start | None, folder: RunFolder) -> tuple[Cursor, list[str]]:
    """Begin with initial weights, or with those of another run."""
    config = learner.config
    if start is None:
        return Cursor(), []
    found = find_start(start.checkpoint, learner.ranks)
    keep = config.start.optimizer == "keep"
    begin_from(found, learner.model, learner.optimizer, keep, learner.ranks)
    parent = found.manifest.position
    origin = json.dumps(start.origin.to_json(), indent=1)
    on_first_rank(learner.ranks, lambda: folder.write(LINEAGE, f"{origin}\n"))
    on_first_rank(learner.ranks, lambda: keep_of_import(found, folder.path))
    notes = [*taken_over(parent, config), *places_told(config), *softmax_changes(found, config)]
    return Cursor(), notes
