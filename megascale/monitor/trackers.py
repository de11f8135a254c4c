"""TensorBoard, wandb, mlflow and trackio. A resumed run continues the same run there.

The id that a tracker gave a run is in the run folder, in `trackers/<name>.json`. All methods of a
tracker are called by one thread (`monitor/background.py`).
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megascale.errors import UserError
from megascale.monitor.background import Tracker, Values
from megascale.parsing import read_json
from megascale.runtime.files import real_path, write_file

PROJECT = "megascale"
Notice = Callable[[str], None]
Config = Mapping[str, Any]
PARAMS_AT_ONCE = 100
"""That mlflow takes in one request."""
LONGEST_PARAM = 500
"""Characters of a value, which every version of an mlflow server takes."""


def tensorboard(run_dir: Path, resume_step: int | None) -> Callable[[Notice], Tracker]:
    """What makes the TensorBoard writer of a run. Raises UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "monitor.tensorboard = true, but tensorboard is not installed: "
            "pip install tensorboard, or set monitor.tensorboard=false"
        ) from None
    return lambda notice: _TensorBoard(SummaryWriter, run_dir, resume_step)


def tracker(
    name: str, run_dir: Path, resume_step: int, config: Config
) -> Callable[[Notice], Tracker]:
    """What makes one of TRACKERS for a run. Raises UserError if its package is not installed."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"monitor.trackers names {name}, which is not installed: pip install {name}, "
            "or leave it out"
        ) from None
    except Exception as error:  # of versions that do not fit each other
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"monitor.trackers names {name}, which cannot be imported ({reason}); mend its "
            "installation, or leave it out"
        ) from None
    place = _Place(run_dir, name, resume_step)
    notes = []
    if resume_step and place.known() is None:
        notes.append("had no run of this folder, or its id was not kept; a new one begins")

    def start(notice: Notice) -> Tracker:
        while notes:
            notice(notes.pop())
        return TRACKERS[name](module, place, config, notice)

    return start


class _Place:
    """Which run of a tracker belongs to a run folder."""

    def __init__(self, run_dir: Path, tracker: str, resume_step: int) -> None:
        self.run_dir = run_dir
        self.name = real_path(run_dir).name
        self.resume_step = resume_step
        self._file = run_dir / "trackers" / f"{tracker}.json"

    def known(self) -> str | None:
        """The id that an earlier start has kept; None where there is none."""
        try:
            found = read_json(self._file)["id"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return found if isinstance(found, str) and found else None

    def keep(self, run_id: str) -> None:
        """Have later starts continue the run of this id."""
        self._file.parent.mkdir(exist_ok=True)
        write_file(self._file, json.dumps({"id": run_id}), synced=True)


class _TensorBoard:
    def __init__(self, writer: Any, run_dir: Path, resume_step: int | None) -> None:
        self._open: Callable[[int | None], Any] = lambda purge: writer(
            str(run_dir / "tensorboard"), purge_step=purge, flush_secs=10
        )
        self._writer = self._open(None if resume_step is None else resume_step + 1)

    def log(self, values: Values, step: int) -> None:
        if self._writer is None:
            self._writer = self._open(None)
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except Exception:
            self._writer = None  # a writer that has failed once takes nothing more
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    """wandb drops rows whose step is not above the last one, so steps are an axis of their own.

    A resumed run may give the same step twice; both points are in the curve.
    """

    def __init__(self, wandb: Any, place: _Place, config: Config, notice: Notice) -> None:
        run_id = place.known() or uuid.uuid4().hex[:12]
        place.keep(run_id)
        _require_login(wandb)
        self._run = wandb.init(
            project=PROJECT,
            id=run_id,
            resume="allow",
            name=place.name,
            dir=str(place.run_dir),
            config=dict(config),
            # no question on the terminal, and no code of wandb where the training loop prints
            settings=wandb.Settings(console="off", login_timeout=1),
        )
        self._run.config.update(dict(config), allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._run.disabled:
            notice("takes no rows: WANDB_MODE is disabled, or nobody is logged in (`wandb login`)")
        elif self._run.offline and place.resume_step:
            notice(
                f"is offline: this start has a folder of its own under {place.run_dir / 'wandb'}, "
                f"with the same run id {run_id}; sync the folders in the order of their dates"
            )

    def log(self, values: Values, step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


def _require_login(wandb: Any) -> None:
    """Raise RuntimeError where nobody is logged in: wandb would ask on the terminal.

    Versions that cannot be asked without a question end it after `login_timeout`.
    """
    asks = "prompt" in inspect.signature(wandb.login).parameters
    if wandb.setup().settings.mode in ("online", "shared") and asks:
        if not wandb.login(prompt=False):
            raise RuntimeError("nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")


class _Mlflow:
    def __init__(self, mlflow: Any, place: _Place, config: Config, notice: Notice) -> None:
        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        # where an earlier try has got so far, the run is active in this thread
        run = mlflow.active_run() or self._enter(place, notice)
        self._run_id = run.info.run_id
        place.keep(self._run_id)
        self._log_config(config, place.resume_step)

    def _enter(self, place: _Place, notice: Notice) -> Any:
        """Continue the run of this folder, or begin one where there is none any more."""
        known = place.known()
        if known is not None and self._is_there(known):
            return self._mlflow.start_run(run_id=known)
        if known is not None:
            notice(f"has no run {known} any more; a new one begins")
        return self._mlflow.start_run(run_name=place.name)

    def _is_there(self, run_id: str) -> bool:
        """Whether the server still has a run. Raises what the client raises if nobody answers."""
        try:
            return bool(self._mlflow.get_run(run_id).info.lifecycle_stage == "active")
        except self._mlflow.MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise

    def _log_config(self, config: Config, resume_step: int) -> None:
        """Log parameters once: mlflow refuses to change them, so a change becomes a tag."""
        wanted = {_mlflow_name(key): text[:LONGEST_PARAM] for key, text in _parameters(config)}
        there = self._mlflow.get_run(self._run_id).data.params
        new = [(key, value) for key, value in wanted.items() if key not in there]
        for begin in range(0, len(new), PARAMS_AT_ONCE):
            self._mlflow.log_params(dict(new[begin : begin + PARAMS_AT_ONCE]))
        changed = {key: value for key, value in wanted.items() if there.get(key, value) != value}
        self._mlflow.set_tags(
            {f"from step {resume_step}/{key}": value for key, value in changed.items()}
        )

    def log(self, values: Values, step: int) -> None:
        named = {_mlflow_name(key): value for key, value in values.items()}
        self._mlflow.log_metrics(named, step=step, synchronous=True, run_id=self._run_id)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    """trackio continues the newest run of a name, so the name has a part that nobody else has."""

    def __init__(self, trackio: Any, place: _Place, config: Config, notice: Notice) -> None:
        name = place.known() or f"{place.name}-{uuid.uuid4().hex[:6]}"
        place.keep(name)
        self._run = trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow")

    def log(self, values: Values, step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Any, _Place, Config, Notice], Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def _parameters(config: Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of all options, as `optim.lr`."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _parameters(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield prefix + key, text


def _mlflow_name(name: str) -> str:
    """A name of characters that mlflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]
