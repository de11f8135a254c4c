"""Finding a checkpoint that can be trusted, and loading it into any layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megascale.checkpoint import folder as folders
from megascale.checkpoint.manifest import MANIFEST, Manifest, verify
from megascale.errors import MissingInput, UserError

if TYPE_CHECKING:
    from megascale.model.model import Model
    from megascale.optim.build import Optimizer
    from megascale.runtime.distributed import Ranks

MEGATRON_FILES = ("latest_checkpointed_iteration.txt", "run_config.yaml")
"""Files that only Megatron writes: the first beside its checkpoints, the second in them."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every file is as its manifest says."""

    folder: Path
    manifest: Manifest
    warnings: tuple[str, ...]
    """One line for each damaged checkpoint that was passed over."""
    bring: Callable[[set[str]], None] | None = None
    """Where files may be on other nodes: brings some to `folder`; to be called by all ranks."""


def find(
    run_dir: str | Path, which: Literal["auto", "latest"] | int, ranks: Ranks | None = None
) -> Found | None:
    """The checkpoint to go on from, verified; each file is read once, shared out over `ranks`.

    A number takes that step and no other. `latest` takes what the file `latest` names or, when
    that is damaged, the good one before it, with a warning; `auto` is the same but gives None
    where there is no checkpoint at all. Every rank gets the same answer.
    Raises UserError when there is none to be had.
    """
    checkpoints = folders.checkpoints_dir(run_dir)
    steps = _on_rank_0(ranks, lambda: _candidates(checkpoints, which))
    if not steps:
        if which == "auto":
            return None
        if which != "latest":
            others = _on_rank_0(ranks, lambda: folders.steps_in(checkpoints))
            raise UserError(
                f"{checkpoints} holds no checkpoint of step {which}; there are: {_listed(others)}"
            )
        raise UserError(f"{checkpoints} holds no checkpoint; leave out --resume to start anew")
    found, warnings = _first_good(checkpoints, steps, ranks)
    if found is not None:
        return found
    if len(warnings) > 1:
        raise UserError(f"no checkpoint in {checkpoints} is good; {'; '.join(warnings)}")
    others = _on_rank_0(ranks, lambda: folders.steps_in(checkpoints))
    listed = _listed(step for step in others if step not in steps)
    raise UserError(f"{warnings[0]}; other checkpoints: {listed}")


def newest_step(run_dir: str | Path, ranks: Ranks | None = None) -> int:
    """The step that `find` tries first; -1 where there is no checkpoint. No file is verified."""
    checkpoints = folders.checkpoints_dir(run_dir)
    steps = _on_rank_0(ranks, lambda: _candidates(checkpoints, "latest")[:1])
    return steps[0] if steps else -1


def find_before(run_dir: str | Path, step: int, ranks: Ranks | None = None) -> Found:
    """The newest good checkpoint of at most `step`. Raises UserError when there is none."""
    checkpoints = folders.checkpoints_dir(run_dir)
    steps = _on_rank_0(ranks, lambda: folders.own_steps(checkpoints))
    found, _ = _first_good(checkpoints, [one for one in reversed(steps) if one <= step], ranks)
    if found is None:
        raise UserError(
            f"{checkpoints} holds no good checkpoint up to step {step}; there are: {_listed(steps)}"
        )
    return found


def _first_good(
    checkpoints: Path, steps: Iterable[int], ranks: Ranks | None
) -> tuple[Found | None, list[str]]:
    """The first checkpoint of `steps` that is good, and what is wrong with those before it."""
    warnings: list[str] = []
    for step in steps:
        folder = checkpoints / folders.name_of(step)
        manifest, faults = _inspect(folder, step, ranks)
        if manifest is not None and not faults:
            return Found(folder, manifest, tuple(warnings)), warnings
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        warnings.append(f"checkpoint {folder} is damaged: {faults[0]}{more}")
    return None, warnings


def find_at(path: str | Path, ranks: Ranks | None = None) -> Found:
    """The checkpoint at `path`, verified: a checkpoint's own folder, or a run_dir, of which it is
    the latest good one. Every rank gets the same answer. Raises UserError when there is none.
    """
    folder = Path(path)
    (is_one,) = _on_rank_0(ranks, lambda: [int((folder / MANIFEST).exists())])
    if not is_one:
        found = find(folder, "auto", ranks)
        if found is None:
            raise _nothing_at(folder)
        return found
    manifest, faults = _inspect(folder, None, ranks)
    if manifest is None or faults:
        raise UserError(f"checkpoint {folder} is damaged: {faults[0]}")
    return Found(folder, manifest, ())


def folder_at(path: str | Path) -> Path:
    """The folder of what `find_at` would take if its files are good; only manifests are read.

    Raises UserError when there is none.
    """
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return folder
    checkpoints = folders.checkpoints_dir(folder)
    steps = _candidates(checkpoints, "latest")
    if not steps:
        raise _nothing_at(folder)
    for step in steps:
        with suppress(UserError):
            one = checkpoints / folders.name_of(step)
            if Manifest.read(one).position.step == step:
                return one
    raise UserError(f"no checkpoint in {checkpoints} is good; there are: {_listed(steps)}")


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the checkpoint in `folder_at(path)`. Raises UserError when there is none."""
    return Manifest.read(folder_at(path))


def _nothing_at(folder: Path) -> UserError:
    if any((folder / name).exists() for name in MEGATRON_FILES):
        return UserError(
            f"{folder} is a checkpoint of Megatron; megascale import makes a checkpoint from it "
            "that runs start from"
        )
    if any(folder.glob("*.distcp")):
        return UserError(
            f"{folder} is a checkpoint that was not written to its end (its {MANIFEST} comes "
            "last); take the one before it, or, if Megatron wrote it: megascale import"
        )
    kind = UserError if folder.exists() else MissingInput
    return kind(f"{folder} holds no checkpoint; give a run_dir or the folder of a checkpoint")


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _candidates(checkpoints: Path, which: str | int) -> list[int]:
    steps = folders.steps_in(checkpoints)
    if isinstance(which, int):
        return [which] if which in steps else []
    left = folders.left_behind(checkpoints)
    return folders.by_preference(steps, folders.read_latest(checkpoints), left)


def _inspect(
    folder: Path, step: int | None, ranks: Ranks | None
) -> tuple[Manifest | None, list[str]]:
    """The manifest and what is wrong with the files, as all ranks together see it."""
    manifest: Manifest | None = None
    try:
        manifest = Manifest.read(folder)
        if step is not None and manifest.position.step != step:
            raise UserError(f"its manifest is of step {manifest.position.step}")
        names = sorted(manifest.files)
        share = names[ranks.rank :: ranks.world] if ranks else names
        faults = [str(fault) for fault in verify(folder, manifest, share)]
    except UserError as error:
        faults = [str(error)]
    told = sorted({fault for of_rank in _gather(faults, ranks) for fault in of_rank})
    return manifest, told


def restore(found: Found, model: Model, optimizer: Optimizer | None, ranks: Ranks) -> Manifest:
    """Load weights and, with `optimizer`, its state in place; the layout may be any.

    `optimizer=None` loads the weights alone: an optimizer that is to train them afterwards must be
    told so by the `reload_model_params` of its `core`. Loading into the layout that wrote them
    restores every bit. No pickled code is executed. Raises UserError, the same on every rank, when
    the model differs from the saved one in any tensor, or when a file is refused.
    """
    from megascale.checkpoint.boxes import boxes
    from megascale.checkpoint.read import load_boxes

    model.gathers.wait()  # one of the step before would write over what is loaded
    if optimizer is not None:
        optimizer.set_steps(found.manifest.optimizer_steps)
    state = optimizer.state if optimizer is not None else None
    load_boxes(found.folder, boxes(model, optimizer), state, ranks, found.bring)
    return found.manifest


def begin_from(
    found: Found, model: Model, optimizer: Optimizer | None, keep_state: bool, ranks: Ranks
) -> None:
    """Let a new run begin with the weights of another one's checkpoint, of any layout or precision.

    With `keep_state` the optimizer goes on as it stood there; without, it begins anew. Raises
    UserError, the same on every rank, when the weights or the moments asked for are not there.
    """
    from megascale.checkpoint.boxes import boxes
    from megascale.checkpoint.read import load_other

    if keep_state and not found.manifest.optimizer_steps:
        raise UserError(
            f"checkpoint {found.folder} holds no state of an optimizer; set start.optimizer=reset"
        )
    state = None
    if optimizer is not None:
        optimizer.set_steps(found.manifest.optimizer_steps if keep_state else 0)
        state = optimizer.state if keep_state else None
    load_other(found.folder, boxes(model, optimizer), state, ranks)


def _on_rank_0(ranks: Ranks | None, ask: Callable[[], list[int]]) -> list[int]:
    """What rank 0 sees in the file system, on every rank."""
    if ranks is None:
        return ask()
    from megascale.runtime.first_rank import from_first_rank

    answer: list[int] = json.loads(from_first_rank(ranks, lambda: json.dumps(ask()).encode()))
    return answer


def _gather(mine: list[str], ranks: Ranks | None) -> list[list[str]]:
    if ranks is None or ranks.world == 1:
        return [mine]
    import torch.distributed as dist

    told: list[Any] = [None] * ranks.world
    dist.all_gather_object(told, mine, group=ranks.control)
    return told
