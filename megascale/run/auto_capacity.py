"""`planner.capacity_tokens: auto`: the number that it stands for on a device."""

from __future__ import annotations

from pathlib import Path

from megascale.checkpoint.load import read_manifest
from megascale.config import Layout, RunConfig, load_config
from megascale.config.layout import least_capacity
from megascale.devices.memory import auto_capacity, with_capacity
from megascale.devices.table import GIB, DeviceMemory
from megascale.errors import UserError
from megascale.run.growing import small_and_grown
from megascale.run.on_device import changes_for_auto


def with_capacity_of(
    config: RunConfig, layout: Layout, name: str, device: DeviceMemory
) -> RunConfig:
    """A finalized config with a number in place of `auto`; any other config as it is.

    Where the model grows, the number is one that both models fit with. Raises UserError, which
    calls the device `name`, where the device holds too little.
    """
    if not config.has_auto_capacity:
        return config
    models = [config] if config.growth is None else small_and_grown(config)[:2]
    return with_capacity(config, min(_capacity(one, layout, name, device) for one in models))


def _capacity(config: RunConfig, layout: Layout, name: str, device: DeviceMemory) -> int:
    tokens = auto_capacity(config, layout, device)
    if tokens:
        return tokens
    least, changes = least_capacity(config, layout.hdp), changes_for_auto(config, layout, device)
    raise UserError(
        f"planner.capacity_tokens = auto: {name} of {device.memory_bytes / GIB:.1f} GiB does not "
        f"hold the {least:,} tokens that each of {layout.hdp:,} HDP ranks needs for "
        f"data.context_tokens = {config.data.context_tokens:,}; "
        + (f"it would with {' or with '.join(changes)}" if changes else _NO_CHANGE)
    )


_NO_CHANGE = "raise parallel.pipeline or lower data.context_tokens"


def recorded_capacity(config: RunConfig, layout: Layout) -> int | None:
    """The number that the run in the folders of `config` was last started with.

    None where there is no such run, and where its latest checkpoint is of another layout.
    """
    started = [Path(one) for one in config.run_dirs if (Path(one) / "config.yaml").exists()]
    if not started or _layout_of(started[-1]) not in (None, vars(layout)):
        return None
    try:
        tokens = load_config(started[-1] / "config.yaml").planner.capacity_tokens
    except UserError:
        return None
    return tokens if isinstance(tokens, int) else None


def _layout_of(run_dir: Path) -> dict[str, int] | None:
    """The sizes with which the latest checkpoint was written; None where there is none."""
    try:
        return dict(read_manifest(run_dir).layout)
    except UserError:
        return None
