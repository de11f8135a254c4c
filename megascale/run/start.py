"""How a new run begins with what another one has learned, and where it goes on in the data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from megascale.checkpoint.folder import EMERGENCY, checkpoints_dir, copies_name, steps_in
from megascale.checkpoint.load import Found, find_at, find_before, folder_at, read_manifest
from megascale.checkpoint.manifest import MANIFEST, Position
from megascale.config import RunConfig, StartConfig, dump_config, load_config, parse_config
from megascale.convert.huggingface.kept import Kept, pass_on
from megascale.errors import UserError
from megascale.optim.schedule import lr_at
from megascale.parsing import is_path, parse_yaml, read_json
from megascale.run.resume import changes, same_start
from megascale.runtime.files import real_path

if TYPE_CHECKING:
    from megascale.runtime.distributed import Ranks

COPY_ID = re.compile("[0-9a-f]{32}")
"""Name of the folder that holds the emergency copies of a start."""
LINEAGE = "lineage.json"
"""File of a run_dir: the origin of the run."""
DECIDES_WEIGHTS = frozenset(
    "num_layers hidden_size num_heads num_kv_heads head_dim ffn_hidden_size tied_embeddings "
    "qk_norm qkv_bias parallel_block mask_tokens moe moe.num_experts moe.ffn_hidden_size "
    "moe.shared_ffn_hidden_size moe.shared_gate moe.normalize_top_k moe.attention_experts".split()
)
"""Options of the model that must be as they were for its weights to fit."""
RATE_TOKENS = "rate_tokens"
"""In the cursor of a grown checkpoint: where its config's schedule stands. Its tokens seen are
those of all branches, and those that a map has learned from."""
SAME_RATE = 0.01
"""Part by which learning rates may differ and count as equal."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint that something was made from."""

    checkpoint: str
    """Its folder, absolute."""
    step: int
    tokens_seen: int

    @staticmethod
    def of(found: Found) -> Parent:
        """A found checkpoint as a parent."""
        position = found.manifest.position
        return Parent(str(found.folder.resolve()), position.step, position.tokens_seen)

    def is_sound(self) -> bool:
        """Whether there could be such a checkpoint."""
        numbers = (self.step, self.tokens_seen)
        return is_path(self.checkpoint) and all(type(n) is int and n >= 0 for n in numbers)


@dataclass(frozen=True)
class Origin:
    """Where a run, or a checkpoint that no run wrote, comes from."""

    made_by: str
    """What made it, in words that a user can type."""
    parents: tuple[Parent, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values for `json.dump`."""
        return asdict(self)

    @staticmethod
    def from_json(value: Any) -> Origin:
        """Inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        origin = Origin(value["made_by"], tuple(Parent(**one) for one in value["parents"]))
        if not isinstance(origin.made_by, str) or not all(map(Parent.is_sound, origin.parents)):
            raise ValueError("parents that cannot be")
        return origin


def origin_of(folder: Path) -> Origin | None:
    """Where a run or a checkpoint that is no run's own comes from; None where nothing says."""
    try:
        if (folder / LINEAGE).exists():
            return Origin.from_json(read_json(folder / LINEAGE))
        document = read_json(folder / MANIFEST)
        return Origin.from_json(document["position"]["cursor"]["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def home_of(checkpoint: str | Path) -> Path:
    """The run that a checkpoint belongs to, or its own folder where it belongs to none.

    An emergency copy belongs to the run that made it, as long as the copy is there to say so.
    """
    path = Path(checkpoint)
    if path.parent.name != "checkpoints":
        return path
    home = path.parents[1]
    return _run_of_copy(path) or home if COPY_ID.fullmatch(home.name) else home


def _run_of_copy(folder: Path) -> Path | None:
    """The run that made an emergency copy; None where the copy does not say."""
    try:
        position = read_manifest(folder).position
        run_dir = parse_config(position.config).run_dir
    except UserError:
        return None
    run = real_path(Path(position.cursor.get("cwd", ""), run_dir))
    return run if copies_name(run) == folder.parents[2].name else None


def kept_of(found: Found) -> Kept | None:
    """What the run of a checkpoint has kept of an import; None where it kept nothing."""
    return Kept.of(home_of(found.folder.resolve()))


def keep_of_import(parent: Found, home: Path) -> None:
    """Let a run, or a checkpoint that no run wrote, keep what its parent has kept of an import.

    Raises UserError where that cannot be read, OSError.
    """
    config = parse_config(parent.manifest.position.config, where=str(parent.folder))
    pass_on(home_of(parent.folder.resolve()), home, config.data.context_tokens)


def require_relatives(branches: Sequence[Found]) -> None:
    """Raise UserError where two of these come from different initial weights, as far as known."""
    first, *others = branches
    for other in others:
        if not _ancestry(other) & _ancestry(first):
            raise UserError(
                f"{other.folder} and {first.folder} do not come from one model (megascale lineage "
                "shows from which they come); experts need branches of one"
            )


def _ancestry(found: Found) -> set[str]:
    """The folders that a checkpoint comes from, and the initial weights where it is known."""
    folders = [home_of(found.folder.resolve())]
    known: set[str] = set()
    while folders:
        folder = folders.pop()
        origin = origin_of(folder)
        parents = origin.parents if origin is not None else ()
        folders += [home for one in parents if str(home := home_of(one.checkpoint)) not in known]
        known |= {str(folder)} if parents else {str(folder), *_seed_of(folder)}
    return known


def _seed_of(folder: Path) -> list[str]:
    """The seed that a run without parents drew its weights by; equal runs have equal ones."""
    try:
        position = read_manifest(folder).position
    except UserError:
        return []
    if not position.step:
        return []  # an import has drawn nothing
    return [f"seed {parse_config(position.config).seed}"]


def start_of(config: RunConfig) -> StartConfig:
    """Where `config` starts, with the very checkpoint where that names a run.

    Its files are not read. A run that has begun keeps its checkpoint, whatever its parent has
    saved since. Raises UserError where there is none.
    """
    start = real_path(config.start.checkpoint or "")
    own, home = real_path(config.run_dir), home_of(start)
    is_run = checkpoints_dir(home).is_dir() or (home / MANIFEST).exists()
    if own in (start, *start.parents) or (is_run and home in own.parents):
        raise UserError(
            f"start.checkpoint = {start} and run_dir {config.run_dir} lie in one another; a run "
            "that starts from another needs a run_dir of its own"
        )
    named = replace(config.start, checkpoint=str(start))
    begun = begun_run(replace(config, start=named))
    if begun is not None:
        return begun.start
    try:
        return replace(named, checkpoint=str(folder_at(start)))
    except UserError as error:
        raise UserError(f"start.checkpoint: {error}") from None


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


def model_of_start(config: RunConfig) -> dict[str, Any]:
    """The model section, as nested mappings, of the checkpoint that `config` starts from.

    A run that has begun keeps it in its own folder, so it can be resumed when its parent is gone.
    Raises UserError where there is no checkpoint.
    """
    begun = begun_run(config)
    return _model(dump_config(begun) if begun is not None else _parent(config).config)


def require_model(config: RunConfig, of_start: Mapping[str, Any]) -> None:
    """Raise UserError where a finalized config asks for other weights than `model_of_start`."""
    start = config.start.checkpoint
    for key, (was, now) in changes(dict(of_start), _model(dump_config(config))).items():
        if key == "vocab_size":
            grow = f", or: megascale grow {quote(start or '')} --operator resize --vocab {now}"
            raise UserError(
                f"model.vocab_size = {now}, but the model of {start} knows {was} ids; leave it "
                f"out{f'{grow} --out DIR' * (now > was)}"
            )
        if key in DECIDES_WEIGHTS:
            raise UserError(
                f"model.{key} = {json.dumps(now)}, but the model of {start} has {json.dumps(was)}; "
                f"leave model.{key} out, or make another model of it with megascale grow"
            )


def with_rate_of_start(config: RunConfig) -> RunConfig:
    """With `optim.lr` of an anneal that leaves it out: the rate where the checkpoint stands.

    Raises UserError where that is not known, or no rate to go down from.
    """
    optim = config.optim
    if config.start.checkpoint is None or optim.curve != "anneal" or optim.lr is not None:
        return config
    begun = begun_run(config)
    rate = begun.optim.schedule[0].lr if begun is not None else rate_of(_parent(config))
    if not rate:
        raise UserError(
            f"optim.curve=anneal needs optim.lr: {config.start.checkpoint} does not say at which "
            "rate it was trained, e.g. optim.lr=1.65e-4"
        )
    return replace(config, optim=replace(optim, lr=rate))


def rate_of(parent: Position) -> float | None:
    """The learning rate at which a checkpoint's run stood; None where it has trained nothing."""
    schedule = parse_config(parent.config).optim.schedule
    tokens = parent.cursor.get(RATE_TOKENS, parent.tokens_seen)
    return lr_at(tokens, schedule) if tokens and schedule else None


def warn_if_rate_jumps(config: RunConfig) -> Iterator[str]:
    """Warnings, where a finalized config goes on from its checkpoint at another rate at once, or
    re-warms it above its peak (arXiv 2403.08763, section 5.1: that adapts, and forgets, more).
    """
    start, (first, *_) = config.start.checkpoint, config.optim.schedule
    try:
        parent = read_manifest(start).position if start is not None else None
    except UserError:
        return  # a run that has begun does without its parent
    rate = rate_of(parent) if parent is not None else None
    if parent is None or rate is None:
        return
    if first.shape == "constant" and abs(first.lr - rate) > SAME_RATE * rate:
        yield (
            f"the learning rate begins at {first.lr:.4g}, and that of {start} was {rate:.4g} "
            f"there; optim.lr={rate:.6g} goes on from it (an anneal without optim.lr does)"
        )
    before = max(segment.lr for segment in parse_config(parent.config).optim.schedule)
    peak = max(segment.lr for segment in config.optim.schedule)
    if peak > (1 + SAME_RATE) * before:
        yield (
            f"the learning rate rises to {peak:.4g}, above the peak of {before:.4g} of {start}; "
            "the same peak is usual, and a higher one forgets more"
        )


def begun_run(config: RunConfig) -> RunConfig | None:
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


def _parent(config: RunConfig) -> Position:
    try:
        return read_manifest(config.start.checkpoint or "").position
    except UserError as error:
        raise UserError(f"start.checkpoint: {error}") from None


def taken_over(parent: Position, config: RunConfig) -> list[str]:
    """What a run takes from the checkpoint it starts from, and what begins anew, a line each."""
    optimizer = "goes on" if config.start.optimizer == "keep" else "begins anew"
    changed = changes(_model(parent.config), _model(dump_config(config)))
    return [
        f"starts with the weights of {config.start.checkpoint}, step {parent.step:,}, "
        f"{parent.tokens_seen:,} tokens seen; the optimizer {optimizer}, the learning rate "
        "follows this run's own schedule",
        *(f"model.{key}: {was} -> {now}" for key, (was, now) in changed.items()),
    ]


def _model(text: str) -> dict[str, Any]:
    return dict((parse_yaml(text, "config") or {}).get("model") or {})
