"""What a run starts from: read once, before the run's own config is complete, and passed on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from megascale.checkpoint.folder import EMERGENCY, checkpoints_dir, steps_in
from megascale.checkpoint.load import Found, find_at, find_before, folder_at, read_manifest
from megascale.checkpoint.manifest import MANIFEST, Position
from megascale.config import (
    RunConfig,
    SourceConfig,
    StartConfig,
    dump_config,
    load_config,
    parse_config,
)
from megascale.corpus.batches import Cursor
from megascale.errors import UserError
from megascale.optim.schedule import lr_at
from megascale.parsing import parse_yaml
from megascale.run.data_read import places_of_replay, read_by, read_until
from megascale.run.origin import Origin, Parent, home_of
from megascale.run.resume import changes, same_start
from megascale.runtime.files import real_path

if TYPE_CHECKING:
    from megascale.runtime.distributed import Ranks

DECIDES_WEIGHTS = frozenset(
    "num_layers hidden_size num_heads num_kv_heads head_dim ffn_hidden_size tied_embeddings "
    "qk_norm qk_norm_heads norm_position qkv_bias parallel_block mask_tokens "
    "moe moe.num_experts moe.ffn_hidden_size moe.shared_ffn_hidden_size moe.shared_gate "
    "moe.normalize_top_k moe.attention_experts".split()
)
"""Options of the model that must be as they were for its weights to fit."""
RATE_TOKENS = "rate_tokens"
"""In the cursor of a grown checkpoint: where its config's schedule stands. Its tokens seen are
those of all branches, and those that a map has learned from."""
SAME_RATE = 0.01
"""Part by which learning rates may differ and count as equal."""


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, and what the run takes from it.

    A run that has begun keeps all of it in its own folder, so it can be resumed when the
    checkpoint is gone.
    """

    section: StartConfig
    """The `start` section of the run's config, with the very checkpoint."""
    model: Mapping[str, Any]
    """The `model` section of the checkpoint's config, as nested mappings."""
    rate: float | None
    """The learning rate at which the checkpoint's run stood; None where it has trained nothing,
    or where that is not known."""
    peak: float | None
    """The highest learning rate of its schedule; None as `rate`."""
    parent: Parent | None
    """None where the checkpoint is gone."""
    read: Mapping[str, SourceConfig]
    """The sources that the runs behind the checkpoint have read, and how far."""
    replayed: Mapping[str, SourceConfig]
    """The sources that the checkpoint's run has replayed, with their places."""
    begun: RunConfig | None
    """The config that the run keeps in its folder; None before there is a checkpoint to resume."""

    @property
    def checkpoint(self) -> str:
        """The folder of the checkpoint."""
        assert self.section.checkpoint is not None
        return self.section.checkpoint

    @property
    def origin(self) -> Origin:
        """What the run says of where it comes from."""
        assert self.parent is not None, "a run begins with a checkpoint that is there"
        return Origin("start.checkpoint", (self.parent,))


def start_of(config: RunConfig) -> Start | None:
    """What `config` starts from; None where it starts with new weights.

    Where it names a run, its newest checkpoint. A run that has begun keeps its checkpoint,
    whatever its parent has saved since. The weights are not read. Raises UserError where there is
    no checkpoint.
    """
    if config.start.checkpoint is None:
        return None
    named = _named(config)
    begun = _begun_run(replace(config, start=named))
    if begun is not None:
        return _start_of_begun(begun)
    try:
        folder = folder_at(real_path(named.checkpoint or ""))
        position = read_manifest(folder).position
    except UserError as error:
        raise type(error)(f"start.checkpoint: {error}") from None
    trained = parse_config(position.config, where=str(folder))
    return Start(
        section=replace(named, checkpoint=str(folder)),
        model=_model(dump_config(trained)),  # with options that earlier versions did not have
        rate=rate_of(position, trained),
        peak=_peak_of(trained),
        parent=Parent.at(folder, position),
        read=read_by(position, trained),
        replayed=places_of_replay(position, trained),
        begun=None,
    )


def _named(config: RunConfig) -> StartConfig:
    """The `start` section with an absolute path, which may be that of a run."""
    start = real_path(config.start.checkpoint or "")
    own, home = real_path(config.run_dir), home_of(start)
    is_run = checkpoints_dir(home).is_dir() or (home / MANIFEST).exists()
    if own in (start, *start.parents) or (is_run and home in own.parents):
        raise UserError(
            f"start.checkpoint = {start} and run_dir {config.run_dir} lie in one another; a run "
            "that starts from another needs a run_dir of its own"
        )
    return replace(config.start, checkpoint=str(start))


def _start_of_begun(begun: RunConfig) -> Start:
    """The same of a run that has begun, by the config that it keeps."""
    try:
        folder = Path(begun.start.checkpoint or "")
        position = read_manifest(folder).position
        trained = parse_config(position.config)
        rate, peak = rate_of(position, trained), _peak_of(trained)
    except UserError:  # it is gone
        position, rate, peak = None, None, None
    return Start(
        section=begun.start,
        model=_model(dump_config(begun)),
        rate=rate,
        peak=peak,
        parent=None if position is None else Parent.at(folder, position),
        read=read_until(begun, Cursor(), {}),
        replayed={},
        begun=begun,
    )


def find_start(checkpoint: str, ranks: Ranks) -> Found:
    """The checkpoint that every rank has taken its config from, verified.

    Raises UserError, the same on every rank, where it is damaged or they have taken several.
    """
    from megascale.runtime.distributed import all_agree, broadcast_bytes

    first = broadcast_bytes(checkpoint.encode(), ranks).decode()
    if not all_agree(checkpoint == first, ranks):
        raise UserError(
            f"start.checkpoint: another checkpoint than {first} was saved while the ranks began; "
            f"start again, or from start.checkpoint={first}"
        )
    try:
        return find_at(checkpoint, ranks)
    except UserError as error:
        folder = Path(checkpoint)
        if folder.parent.name != "checkpoints" or not folder.name.isdigit():
            raise
        try:
            before = find_before(home_of(folder), int(folder.name) - 1, ranks)
        except UserError:
            raise error from None
        raise UserError(f"{error}; start from {before.folder} instead") from None


def require_model(config: RunConfig, start: Start) -> None:
    """Raise UserError where a finalized config asks for other weights than its start has."""
    checkpoint = start.checkpoint
    for key, (was, now) in changes(dict(start.model), _model(dump_config(config))).items():
        if key == "vocab_size":
            grow = f", or: megascale grow {quote(checkpoint)} --operator resize --vocab {now}"
            raise UserError(
                f"model.vocab_size = {now}, but the model of {checkpoint} knows {was} ids; leave "
                f"it out{f'{grow} --out DIR' * (now > was)}"
            )
        if key in DECIDES_WEIGHTS:
            raise UserError(
                f"model.{key} = {json.dumps(now)}, but the model of {checkpoint} has "
                f"{json.dumps(was)}; leave model.{key} out, or make another model of it with "
                "megascale grow"
            )


def with_rate_of_start(config: RunConfig, start: Start | None) -> RunConfig:
    """With `optim.lr` of an anneal that leaves it out: the rate where the checkpoint stands.

    Raises UserError where that is not known, or no rate to go down from.
    """
    optim = config.optim
    if start is None or optim.curve != "anneal" or optim.lr is not None:
        return config
    rate = start.begun.optim.schedule[0].lr if start.begun is not None else start.rate
    if not rate:
        raise UserError(
            f"optim.curve=anneal needs optim.lr: {start.checkpoint} does not say at which "
            "rate it was trained, e.g. optim.lr=1.65e-4"
        )
    return replace(config, optim=replace(optim, lr=rate))


def rate_of(parent: Position, config: RunConfig) -> float | None:
    """The learning rate at which a checkpoint's run stood; None where it has trained nothing.

    `config` is that of the position.
    """
    schedule = config.optim.schedule
    tokens = parent.cursor.get(RATE_TOKENS, parent.tokens_seen)
    return lr_at(tokens, schedule) if tokens and schedule else None


def _peak_of(config: RunConfig) -> float | None:
    return max((segment.lr for segment in config.optim.schedule), default=None)


def warn_if_rate_jumps(config: RunConfig, start: Start | None) -> Iterator[str]:
    """Warnings, where a finalized config goes on from its checkpoint at another rate at once, or
    re-warms it above its peak (arXiv 2403.08763, section 5.1: that adapts, and forgets, more).
    """
    if start is None or start.rate is None or start.peak is None:
        return
    first, *_ = config.optim.schedule
    if first.shape == "constant" and abs(first.lr - start.rate) > SAME_RATE * start.rate:
        yield (
            f"the learning rate begins at {first.lr:.4g}, and that of {start.checkpoint} was "
            f"{start.rate:.4g} there; optim.lr={start.rate:.6g} goes on from it (an anneal without "
            "optim.lr does)"
        )
    peak = max(segment.lr for segment in config.optim.schedule)
    if peak > (1 + SAME_RATE) * start.peak:
        yield (
            f"the learning rate rises to {peak:.4g}, above the peak of {start.peak:.4g} of "
            f"{start.checkpoint}; the same peak is usual, and a higher one forgets more"
        )


def _begun_run(config: RunConfig) -> RunConfig | None:
    """The resolved config that a run keeps in its folder, once it has something to resume from.

    What it says of the data holds for its seed and context; of a run that may have nothing but
    emergency copies it counts for these alone.
    """
    own, checkpoints = Path(config.run_dir) / "config.yaml", checkpoints_dir(config.run_dir)
    has_saved, has_copies = steps_in(checkpoints), (checkpoints / EMERGENCY).exists()
    if not own.exists() or not (has_saved or has_copies):
        return None
    begun = load_config(own)
    same_order = (begun.seed, begun.data.context_tokens) == (
        config.seed,
        config.data.context_tokens,
    )
    return begun if same_start(begun, config) and (has_saved or same_order) else None


def taken_over(parent: Position, config: RunConfig) -> list[str]:
    """What a run takes from the checkpoint it starts from, and what begins anew, a line each."""
    optimizer = "goes on" if config.start.optimizer == "keep" else "begins anew"
    was = dump_config(parse_config(parent.config))
    changed = changes(_model(was), _model(dump_config(config)))
    return [
        f"starts with the weights of {config.start.checkpoint}, step {parent.step:,}, "
        f"{parent.tokens_seen:,} tokens seen; the optimizer {optimizer}, the learning rate "
        "follows this run's own schedule",
        *(f"model.{key}: {was} -> {now}" for key, (was, now) in changed.items()),
    ]


def _model(text: str) -> dict[str, Any]:
    return dict((parse_yaml(text, "config") or {}).get("model") or {})
