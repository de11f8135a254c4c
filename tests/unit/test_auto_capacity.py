"""`planner.capacity_tokens: auto`: the most that a device holds, against a search by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_plan_device import BIG, H100, load, path, printed  # noqa: F401

from megascale.config import dump_config
from megascale.devices.memory import fullest, with_capacity
from megascale.devices.table import DEVICES, GIB, DeviceMemory
from megascale.errors import UserError
from megascale.run.auto_capacity import recorded_capacity, with_capacity_of
from megascale.run.growing import small_and_grown
from megascale.training.capacity import device_memory

AUTO = "planner.capacity_tokens=auto"
LONG = "data.context_tokens=256Ki"


def by_search(config, layout, device, multiple) -> int:
    """Upwards in steps until the memory of a stage is too small."""
    tokens = 0
    while fullest(with_capacity(config, tokens + multiple), layout, device) <= device.memory_bytes:
        tokens += multiple
    return tokens


@pytest.mark.parametrize(
    "overrides, multiple",
    [
        ((LONG,), 128),
        ((LONG, "train.recompute=full"), 128),
        ((LONG, "parallel.pipeline=4"), 128),
        ((LONG, "parallel.tensor=4", "planner.name=static"), 128),
        ((LONG, "planner.host_copy_bytes_per_s=50e9"), 128),
        (
            (
                *(LONG, "parallel.tensor=3"),
                "model={num_layers: 32, hidden_size: 4032, num_heads: 36, num_kv_heads: 6, "
                "ffn_hidden_size: 13824, vocab_size: 128256, tied_embeddings: false}",
            ),
            384,
        ),
    ],
)
def test_the_number_is_the_largest_that_fits(load, overrides, multiple) -> None:  # noqa: F811
    config, layout = load(*BIG, AUTO, *overrides, ranks=192)
    found = with_capacity_of(config, layout, "h100", H100).planner.capacity_tokens
    assert found == by_search(config, layout, H100, multiple)
    assert 0 < found < config.data.context_tokens


def test_short_sequences_fill_what_the_device_holds(load) -> None:  # noqa: F811
    """Up to an even share of the batch, where that is more than the context."""
    words = (*BIG, AUTO, "data.context_tokens=4096")
    config, layout = load(*words, "data.global_batch_tokens=4Mi", ranks=64)
    found = with_capacity_of(config, layout, "h100", H100).planner.capacity_tokens
    assert 4096 < found == by_search(config, layout, H100, 128) < (4 << 20) // 64
    config, layout = load(*words, "data.global_batch_tokens=300000", ranks=64)
    assert with_capacity_of(config, layout, "h100", H100) == with_capacity(config, 4736)


def test_what_is_of_no_use_is_not_taken(load) -> None:  # noqa: F811
    for context in (1000, 4096):
        config, layout = load(*BIG, AUTO, f"data.context_tokens={context}", ranks=64)
        found = with_capacity_of(config, layout, "h100", H100)
        assert found == with_capacity(config, max(context, 64 * 1024 // 64))
    config, layout = load(
        *BIG, AUTO, "planner.name=longest_first", "train.recompute=full", ranks=64
    )
    assert with_capacity_of(config, layout, "h100", H100) == with_capacity(config, 16384)


def test_both_models_of_a_run_that_grows_fit(load) -> None:  # noqa: F811
    grow = "growth={operator: stack, factor: 2, at_tokens: 100K}"
    config, layout = load(*BIG, AUTO, LONG, grow, "model.num_layers=16", ranks=64)
    found = with_capacity_of(config, layout, "h100", H100).planner.capacity_tokens
    small, grown, _ = small_and_grown(config)
    assert found == by_search(grown, layout, H100, 128) < by_search(small, layout, H100, 128)


def test_where_none_works_the_line_names_what_would(load) -> None:  # noqa: F811
    words, a100 = (*BIG, AUTO, LONG), DEVICES["a100-40"]
    config, layout = load(*words, ranks=16)
    with pytest.raises(UserError) as caught:
        with_capacity_of(config, layout, "a100-40", a100)
    text = str(caught.value)
    assert "a100-40 of 40.0 GiB" in text and "the 16,384 tokens" in text and "\n" not in text
    changes = text.partition("; it would with ")[2].split(" or with ")
    assert len(changes) > 1
    for change in changes:
        names = change.split()
        ranks = int(names[names.index("--ranks") + 1]) if "--ranks" in names else 16
        changed = load(*words, *(word for word in names if "=" in word), ranks=ranks)
        assert with_capacity_of(*changed, "a100-40", a100).planner.capacity_tokens > 0
    with pytest.raises(UserError, match="raise parallel.pipeline or lower data.context_tokens"):
        with_capacity_of(config, layout, "toy", DeviceMemory(memory_bytes=GIB))


def test_the_longest_sequence_fits_exactly_or_not_at_all(load) -> None:  # noqa: F811
    """With memory for half the context on each of two ranks, and for 128 tokens less."""
    config, layout = load(*BIG, AUTO, ranks=2)
    bytes_of = [fullest(with_capacity(config, tokens), layout, H100) for tokens in (8192, 8064)]
    enough, short = (DeviceMemory(memory_bytes=number) for number in bytes_of)
    assert with_capacity_of(config, layout, "x", enough).planner.capacity_tokens == 8192
    with pytest.raises(UserError, match="the 8,192 tokens that each of 2 HDP ranks needs"):
        with_capacity_of(config, layout, "x", short)
    copies = replace(config.planner, host_copy_bytes_per_s=5e10)  # 16 times as much of a sequence
    config = replace(config, planner=copies)
    assert with_capacity_of(config, layout, "x", short).planner.capacity_tokens == 8064


def test_plan_prints_the_number_of_the_device(load, path, capsys) -> None:  # noqa: F811
    text = printed(capsys, path, *BIG, AUTO, LONG, "--ranks", 64, "--device", "h100")
    config, layout = load(*BIG, AUTO, LONG, ranks=64)
    number = with_capacity_of(config, layout, "h100", H100).planner.capacity_tokens
    assert f"  capacity              {number:,} tokens per rank and micro-batch" in text
    assert f"{number:,} tokens would fit" in text and "memory on h100          fits" in text
    with pytest.raises(UserError, match="auto is what a device holds: give --device a100-40, "):
        printed(capsys, path, *BIG, AUTO, "--ranks", 64)
    with pytest.raises(UserError, match="planner.capacity_tokens must be a whole number"):
        printed(capsys, path, "planner.capacity_tokens=most", "--device", "h100")


def test_the_number_of_a_run_folder_is_kept(load, tmp_path: Path) -> None:  # noqa: F811
    config, layout = load(AUTO, ranks=4)
    assert recorded_capacity(config, layout) is None
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(with_capacity(config, 96)))
    assert recorded_capacity(config, layout) == 96
    for other in ("no: [yaml", dump_config(config), "\x00"):
        (folder / "config.yaml").write_text(other)
        assert recorded_capacity(config, layout) is None


def test_a_cpu_has_no_memory_of_its_own() -> None:
    with pytest.raises(UserError, match="needs a GPU: .* give a number, or leave the option out"):
        device_memory(torch.device("cpu"))
