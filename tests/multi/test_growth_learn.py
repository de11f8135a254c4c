"""Growth by a learned map: its gradients, what no step leaves, and that it learns."""

import shutil

import numpy as np
import pytest
from crash_drill import curve
from test_checkpoint import Run
from test_growth import grow, run_and_save, stored_and_grown
from test_train import command
from tiny_corpus import tiny_config

LEARN = ("--operator", "learn", "--factor", "2")


@pytest.fixture(scope="module")
def base(rank_pools, tmp_path_factory):
    """A run of forty steps over real text."""
    folder = tmp_path_factory.mktemp("base")
    words = (tiny_config(folder), f"run_dir={folder / 'run'}", "train.tokens=40000")
    ((status, said),) = rank_pools.run(1, command, "train", *words, "eval.every_steps=0")
    assert status == 0, said
    return folder / "run"


@pytest.fixture(scope="module", params=[(), ("model.moe.num_experts=4",)], ids=["dense", "moe"])
def short(request, rank_pools, tmp_path_factory):
    """Two steps."""
    folder = tmp_path_factory.mktemp("short")
    words = (tiny_config(folder), f"run_dir={folder / 'run'}", "train.tokens=2000", *request.param)
    ((status, said),) = rank_pools.run(1, command, "train", *words, "eval.tokens=0")
    assert status == 0, said
    return folder / "run"


def test_no_step_is_stack(ranks, short, tmp_path):
    ((_, stack),) = ranks(1, stored_and_grown, short, tmp_path / "stack", "--factor", "2")
    words = (*LEARN, "--steps", "0")
    ((_, learned),) = ranks(1, stored_and_grown, short, tmp_path / "learn", *words)
    assert stack.keys() == learned.keys()
    assert all(learned[key].equal(one) for key, one in stack.items())


def gradients_and_differences(folder, model):
    """Some gradients of the maps of a model, and central differences of the loss in fp64."""
    import torch

    from megascale.checkpoint.load import find_at
    from megascale.checkpoint.tensors import Tensors
    from megascale.growth.learn import DepthMaps
    from megascale.mesh.packing import TokenSequence, pack
    from megascale.training.step import run_micro_batches

    run = Run(["model.num_layers=4", *model])
    maps = DepthMaps(Tensors(find_at(folder)), run.model, 2)
    for one in maps.maps.values():  # anywhere, as after some steps
        one += 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    maps.fill()
    ids = np.random.default_rng(0).integers(0, 100, 33)
    batch = pack([TokenSequence(ids[:-1], ids[1:])], 0, 1, run.ranks.device)
    run.model.zero_grad_buffer()
    run_micro_batches(run.learner, [batch], 1)
    found = maps.gradients()
    exact = run.model.chunks[0].module.double()
    maps._base = {key: one.double() for key, one in maps._base.items()}
    maps.maps = {key: one.double() for key, one in maps.maps.items()}

    def loss():
        maps.fill()
        with torch.no_grad():
            logits = exact(
                input_ids=batch.tokens_T[None],
                position_ids=batch.segments.positions_T[None],
                attention_mask=None,
                packed_seq_params=batch.segments,
            )[0]
        return float(torch.nn.functional.cross_entropy(logits, batch.targets_T, reduction="sum"))

    pairs = []
    for key, one in maps.maps.items():
        for place in ((0, 0), (1, 0), (3, 1)):
            value, step = float(one[place]), 1e-4
            ends = []
            for moved in (value + step, value - step):
                one[place] = moved
                ends.append(loss())
            one[place] = value
            pairs.append((key, float(found[key][place]), (ends[0] - ends[1]) / (2 * step)))
    return pairs


@pytest.mark.parametrize("model", [(), ("model.moe.num_experts=4",)], ids=["dense", "moe"])
def test_gradients_against_differences(ranks, tmp_path, model):
    ranks(1, run_and_save, tmp_path, model)
    quiet = ("model.moe.balance=none",) if model else ()
    (pairs,) = ranks(1, gradients_and_differences, tmp_path, (*model, *quiet))
    largest = max(abs(difference) for _, _, difference in pairs)
    assert len(pairs) >= 15 and largest > 0.01
    assert len([1 for _, gradient, _ in pairs if gradient]) == len(pairs)
    for key, gradient, difference in pairs:
        assert gradient == pytest.approx(difference, rel=1e-3, abs=3e-4 * largest), key


def evaluated(ranks, checkpoint, base, run):
    """Held-out loss before the first step of a branch, and the line about its data."""
    words = (checkpoint, base.parent / "config.yaml", f"run_dir={run}", "train.stop_after_steps=1")
    ((status, said),) = ranks(1, command, "branch", *words, "model={}")
    assert status == 0, said
    first = next(row for row in curve(run).values() if "eval" in row)
    return first["eval"]["tiny"]["loss"], said


def test_a_learned_map_is_better_than_stack(ranks, base, tmp_path):
    ranks(1, grow, base, "--factor", "2", "--out", tmp_path / "stack")
    (said,) = ranks(1, grow, base, *LEARN, "--steps", "40", "--out", tmp_path / "learn")
    assert "--steps 40, loss " in said
    stack, _ = evaluated(ranks, tmp_path / "stack", base, tmp_path / "a")
    learned, told = evaluated(ranks, tmp_path / "learn", base, tmp_path / "b")
    print(stack, learned)
    assert learned < stack - 0.01
    assert "goes on after the" in told and "step 40" in told


def read_so_far(folder):
    """Tokens that a checkpoint says were read of its source."""
    from megascale.checkpoint.load import find_at

    position = find_at(folder).manifest.position
    return position.tokens_seen, position.cursor["data"]["sources"]["tiny"]["tokens"]


def test_what_the_map_has_read_is_not_read_again(ranks, short, tmp_path):
    ranks(1, grow, short, *LEARN, "--steps", "3", "--out", tmp_path / "out")
    ((before, _),), ((after, tokens),) = (
        ranks(1, read_so_far, folder) for folder in (short, tmp_path / "out")
    )
    assert after == tokens == pytest.approx(before + 3 * 1024, abs=300)


def test_data_that_is_gone_is_one_line(ranks, tmp_path):
    config = tiny_config(tmp_path / "corpus")
    run = tmp_path / "run"
    ((status, said),) = ranks(1, command, "train", config, f"run_dir={run}", "train.tokens=1000")
    assert status == 0, said
    shutil.rmtree(tmp_path / "corpus")
    ((status, said),) = ranks(1, command, "grow", run, *LEARN, "--out", tmp_path / "out")
    assert (
        status == 2
        and "--operator learn reads what" in said
        and "no corpus there" in said
        and said.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()
