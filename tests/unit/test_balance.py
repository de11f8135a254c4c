"""Balance losses on one process: the paper's facts, who counts, when routing has collapsed."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pictures
import pytest
import torch

from megascale.config import MoeConfig
from megascale.mesh.packing import TokenSequence, pack
from megascale.monitor.experts import (
    COLLAPSED_STEPS,
    CollapseWatch,
    ExpertLog,
    divergence_L,
    plot_shares,
    read_shares,
)
from megascale.runtime import distributed

distributed.prepare_device("auto")  # before megatron-core is imported

from megascale.model import balance  # noqa: E402

CPU = torch.device("cpu")


def part_of(lengths, padding=0):
    """A rank that holds whole sequences, and says so itself."""
    ids = np.zeros(max(lengths, default=0), dtype=np.int64)
    sequences = [TokenSequence(ids[:n], ids[:n]) for n in lengths]
    multiple = sum(lengths) + padding if padding else 1
    batch = pack(sequences, 0, multiple, CPU, sources=[i % 2 for i in range(len(lengths))])
    alone = type("Alone", (), {"rank": lambda self: 0, "size": lambda self: 1})()
    return balance._Part.of(batch.segments, sum(lengths) + padding, alone)


def grouped(chosen, scores, groups, lengths):
    part = part_of(lengths)
    scores = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor(chosen, dtype=torch.float64)
    loss = balance._grouped(scores, chosen, groups(part), part)
    (grad,) = torch.autograd.grad(loss, scores)
    return float(loss.detach()), grad


def everything(part):
    return torch.ones(1, part.num_tokens)


def by_sequence(part):
    return part.by_sequence_GT


OPPOSITE = [[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3


def test_two_opposite_groups_have_loss_2_apart_and_1_together():
    """The paper's fact, with three tokens each; losses are sums over tokens."""
    apart, _ = grouped(OPPOSITE, OPPOSITE, by_sequence, [3, 3])
    together, _ = grouped(OPPOSITE, OPPOSITE, everything, [3, 3])
    assert apart / 6 == pytest.approx(2.0) and together / 6 == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_even_use_has_loss_1_whatever_is_chosen_at_once(top_k):
    chosen = [[float((e - t) % 4 < top_k) for e in range(4)] for t in range(8)]
    loss, grad = grouped(chosen, [[0.25] * 4] * 8, everything, [8])
    assert loss / 8 == pytest.approx(1.0)
    assert grad.numpy() == pytest.approx(1.0)  # and no expert is preferred


def test_all_tokens_to_one_expert_is_the_number_of_experts():
    loss, grad = grouped([[1.0, 0, 0, 0]] * 5, [[1.0, 0, 0, 0]] * 5, everything, [5])
    assert loss / 5 == pytest.approx(4.0)
    assert grad.tolist() == [[4.0, 0, 0, 0]] * 5


def test_all_tokens_to_the_same_experts_is_the_number_of_experts_over_top_k():
    """As much as there can be; the violation is one less."""
    counts = torch.tensor([[[6.0, 6.0, 0.0, 0.0, 0.0, 0.0]]]).double()
    use = balance.ExpertUse(counts, torch.tensor([[0.5, 0.5, 0, 0, 0, 0]]).double())
    assert use.loss_L.tolist() == [3.0] and use.max_violation_L.tolist() == [2.0]
    assert use.dead_L.tolist() == [4]


@pytest.mark.parametrize("groups", ["everything", "by_sequence"])
def test_a_micro_batch_without_tokens_has_no_loss(groups):
    """Ranks that have run out of sequences run padding."""
    part = part_of([], padding=4)
    assert part.num_tokens == 0
    scores = torch.zeros(0, 4, requires_grad=True)
    loss = balance._grouped(scores, scores.detach(), globals()[groups](part), part)
    assert float(loss.detach()) == 0.0
    assert torch.autograd.grad(loss, scores)[0].shape == (0, 4)


@pytest.mark.parametrize("groups", ["everything", "by_sequence"])
def test_fewer_tokens_than_experts_are_balanced_like_any(groups):
    """One token of top-1 among four: the whole of its choice on one expert."""
    loss, grad = grouped([[0.0, 1, 0, 0]], [[0.1, 0.7, 0.1, 0.1]], globals()[groups], [1])
    assert loss == pytest.approx(4 * 0.7) and grad.tolist() == [[0, 4.0, 0, 0]]


def test_the_loss_of_groups_is_weighted_by_their_tokens():
    """One long and one short sequence: as each alone, times its tokens."""
    generator = np.random.default_rng(0)
    scores = generator.dirichlet([1.0] * 4, 7)
    chosen = np.eye(4)[scores.argmax(axis=1)]
    loss, _ = grouped(chosen, scores, by_sequence, [5, 2])
    expected = sum(
        len(rows) * 4 * (chosen[rows].mean(axis=0) * scores[rows].mean(axis=0)).sum()
        for rows in (range(5), range(5, 7))
    )
    assert loss == pytest.approx(expected)


def test_padding_is_no_token():
    part = part_of([3, 2], padding=3)
    assert part.num_tokens == 5
    assert part.sequence_T.tolist() == [0, 0, 0, 1, 1] and part.source_T.tolist() == [0, 0, 0, 1, 1]
    beyond = type("Second", (), {"rank": lambda self: 1, "size": lambda self: 1})()
    ids = np.zeros(3, dtype=np.int64)
    batch = pack([TokenSequence(ids, ids)], 0, 8, CPU)
    assert balance._Part.of(batch.segments, 4, beyond).num_tokens == 0
    empty = pack([], 0, 4, CPU)
    assert balance._Part.of(empty.segments, 4, beyond).num_tokens == 0


# --------------------------------------------------------------------------- estimates of the load


def tally_of(estimate, batches, before=(1.0, 1.0), loss_tokens=None):
    """The loads taken for micro-batches of a top-1 choice among two experts, by their counts."""
    moe = MoeConfig(num_experts=2, top_k=1, estimate=estimate)
    tally = balance.Tally(moe, 1, CPU)
    everything = sum(map(sum, batches))
    tally.begin(len(batches), everything if loss_tokens is None else loss_tokens)
    found = []
    for first, second in batches:
        chosen = torch.tensor([[1, 0]] * first + [[0, 1]] * second).reshape(-1, 2)
        part = part_of([max(1, first + second)])
        part = balance._Part(
            first + second,
            torch.zeros(first + second, dtype=torch.int64),
            torch.zeros(first + second, dtype=torch.int64),
            1,
            first + second,
            part.over_tensor,
            part.over_ranks,
        )
        tally.add(chosen, torch.full((first + second, 2), 0.5), part)
        found.append(tally.estimate(torch.tensor(before), part).tolist())
    return found


def test_the_buffer_is_the_running_mean_and_ends_with_the_whole():
    loads = tally_of("buffer", [(4, 0), (0, 2), (0, 6)])
    assert loads[0] == [2.0, 0.0]
    assert loads[1] == pytest.approx([2 * 4 / 6, 2 * 2 / 6])
    assert loads[2] == pytest.approx([2 * 4 / 12, 2 * 8 / 12])


@pytest.mark.parametrize("estimate", ["buffer_corrected", "previous_corrected"])
def test_a_corrected_estimate_is_right_on_the_mean_of_all_tokens(estimate):
    """One rank that has the whole batch: its last micro-batch makes up for all."""
    batches = [(4, 1), (0, 3), (2, 6)]
    loads = np.array(tally_of(estimate, batches, before=(0.4, 1.6)))
    tokens = np.array([sum(one) for one in batches])
    mean = (loads * tokens[:, None]).sum(axis=0) / tokens.sum()
    assert mean == pytest.approx([2 * 6 / 16, 2 * 10 / 16])


def test_a_rank_of_many_corrects_its_part_only():
    """Of a batch four times as large the rest is taken to be as it was."""
    loads = tally_of("previous_corrected", [(4, 0)], before=(0.5, 1.5), loss_tokens=16)
    assert loads == [pytest.approx([0.5 + (2 - 0.5) / 4, 1.5 - 1.5 / 4])]


def test_a_last_micro_batch_without_tokens_corrects_nothing():
    loads = tally_of("buffer_corrected", [(4, 0), (0, 0)])
    assert loads[1] == [2.0, 0.0]


def test_the_batch_before_is_taken_as_it_was():
    for how in ("previous", "trend"):
        assert tally_of(how, [(4, 0), (0, 1)], before=(0.5, 1.5)) == [[0.5, 1.5]] * 2


def test_a_trend_makes_up_for_what_the_step_before_did_not_know():
    """Over steps the loads that were taken sum to those that were, but for the last change."""
    router = SimpleNamespace(load_E=torch.ones(2), earlier_E=torch.ones(2), moe=MoeConfig())
    ours = balance.Balance.__new__(balance.Balance)
    ours.moe, ours._routers = router.moe, {1: router}
    found = np.random.default_rng(0).dirichlet([3.0, 3.0], 6) * 2
    taken = []
    for load in found:
        taken.append(balance.BalancedRouter.foreseen_E.fget(router).numpy())
        counts = torch.from_numpy(load)[None, None] * 50
        ours.adopt(balance.ExpertUse(counts, torch.full((1, 2), 0.5)))
    assert taken[0].tolist() == [1, 1] and taken[1] == pytest.approx(2 * found[0] - 1)
    assert sum(taken) == pytest.approx(sum(found) - (found[-1] - found[-2]))
    router.moe = MoeConfig(estimate="previous")
    assert balance.BalancedRouter.foreseen_E.fget(router).numpy() == pytest.approx(found[-1])


def test_loads_without_a_choice_are_even():
    assert balance.load_of(torch.zeros(3)).tolist() == [1.0] * 3


# -------------------------------------------------------------------------------------- loss-free


def test_a_bias_changes_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    _, chosen = balance._choose(logits, torch.zeros(3), MoeConfig(top_k=2))
    assert chosen.tolist() == [[True, True, False]]
    bias = torch.tensor([0.0, 0.0, 0.9])
    probs, chosen = balance._choose(logits, bias, MoeConfig(top_k=2))
    assert chosen.tolist() == [[True, False, True]]
    expected = [1 / (1 + math.exp(-2)), 0.0, 1 / (1 + math.exp(2))]
    assert probs.tolist() == [pytest.approx(expected)]
    probs, _ = balance._choose(logits, bias, MoeConfig(top_k=2, normalize_top_k=False))
    e, _, h = torch.softmax(logits, dim=-1)[0].tolist()
    assert probs.tolist() == [pytest.approx([e, 0.0, h])]


def test_one_expert_alone_is_weighted_by_its_probability():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    everything = torch.softmax(logits, dim=-1)[0]
    for bias, best in ((0.0, 0), (0.9, 2)):
        probs, chosen = balance._choose(logits, torch.tensor([0.0, 0.0, bias]), MoeConfig(top_k=1))
        assert chosen[0].tolist() == [expert == best for expert in range(3)]
        expected = [float(everything[best]) * (expert == best) for expert in range(3)]
        assert probs[0].tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------------ observation


def test_use_of_experts_in_numbers():
    counts = torch.tensor([[[4.0, 0.0], [1.0, 3.0]], [[0.0, 4.0], [4.0, 0.0]]])  # S, L, E
    use = balance.ExpertUse(counts.double(), torch.tensor([[0.5, 0.5], [0.25, 0.75]]).double())
    assert use.load_LE.tolist() == [[1.0, 1.0], [1.25, 0.75]]
    assert use.loss_L.tolist() == [1.0, 1.25 * 0.25 + 0.75 * 0.75]
    assert use.max_violation_L.tolist() == [0.0, 0.25]
    assert use.dead_L.tolist() == [0, 0]


def collapse_watch(**options):
    return CollapseWatch(MoeConfig(**{"num_experts": 4, "top_k": 2, **options}))


COLLAPSED = np.array([[6.0, 6.0, 6.0, 6.0], [12.0, 12.0, 0.0, 0.0]])
"""Choices of 12 tokens in 2 layers."""


def test_collapse_is_said_once_and_only_when_it_lasts():
    watch, even = collapse_watch(), COLLAPSED[[0, 0]]
    said = [watch.see(COLLAPSED) for _ in range(COLLAPSED_STEPS + 5)]
    assert [bool(one) for one in said].index(True) == COLLAPSED_STEPS - 1
    assert sum(map(bool, said)) == 1 and "in layer 2:" in said[COLLAPSED_STEPS - 1]
    assert "now one gets 100% of the tokens and 2 of 4 get nothing" in said[COLLAPSED_STEPS - 1]
    watch = collapse_watch()
    steps = [COLLAPSED] * (COLLAPSED_STEPS - 1) + [even] * 20
    assert not any(watch.see(one) for one in steps)
    always = collapse_watch(top_k=4)  # all experts, for every token
    assert not any(always.see(even) for _ in range(20))


def test_even_use_is_no_collapse_however_many_experts_a_token_visits():
    for num_experts in range(2, 10):
        for top_k in range(1, num_experts + 1):
            watch = collapse_watch(num_experts=num_experts, top_k=top_k)
            even = np.full((1, num_experts), 100.0 * top_k / num_experts)
            nearly = even * np.where(np.arange(num_experts) == 0, 1.05, 1.0)
            assert not any(watch.see(one) for one in [even, nearly] * COLLAPSED_STEPS)


def test_collapse_is_said_again_when_it_comes_back():
    watch, even = collapse_watch(), COLLAPSED[[0, 0]]
    steps = ([COLLAPSED] * COLLAPSED_STEPS + [even]) * 2
    assert sum(bool(watch.see(one)) for one in steps) == 2


def test_batches_of_fewer_tokens_than_experts_show_no_collapse():
    watch = collapse_watch()
    assert not any(watch.see(COLLAPSED / 4) for _ in range(20))
    assert not any(watch.see(0 * COLLAPSED) for _ in range(20))


@pytest.mark.parametrize(
    "balance, mend",
    [
        ("none", "set model.moe.balance=global"),
        ("loss_free", "set model.moe.balance=global"),
        ("global", "raise model.moe.balance_weight"),
    ],
)
def test_a_collapse_says_what_would_mend_it(balance, mend):
    watch = collapse_watch(balance=balance)
    assert mend in [watch.see(COLLAPSED) for _ in range(COLLAPSED_STEPS)][-1]


def test_divergence_of_sources():
    same, apart = np.full((2, 1, 4), 0.25), np.array([[[0.5, 0.5, 0, 0]], [[0, 0, 0.5, 0.5]]])
    assert divergence_L(same) == pytest.approx([0.0])
    assert divergence_L(apart) == pytest.approx([1.0])


def test_the_record_is_read_and_drawn(tmp_path):
    log = ExpertLog(tmp_path, 0)
    log.write(2, ["a", "b", "c"], np.array([[[3.0, 1.0]], [[0.0, 4.0]], [[0.0, 0.0]]]))
    log.write(4, ["a", "b", "c"], np.array([[[1.0, 1.0]], [[0.0, 4.0]], [[0.0, 0.0]]]))
    log.close()
    step, sources, shares = read_shares(tmp_path)
    assert (step, sources) == (4, ["a", "b"]) and shares.tolist() == [[[0.5, 0.5]], [[0.0, 1.0]]]
    with pictures.drawn_figures() as drawn:
        plot_shares(sources, shares, "two", tmp_path / "experts.png")
    pictures.require_readable(drawn[0])
    *maps, bar = drawn[0].axes
    use = [axes.images[0] for axes in maps if axes.images]
    shown = [image.get_array().tolist() for image in use]
    assert shown == [[[0.5, 1.5]], [[1.0, 1.0]], [[0.0, 2.0]]]  # all, a, b: over even use
    assert {image.get_clim() for image in use} == {(0, 2)}  # whatever the run does
    assert [axes.get_title(loc="left") for axes in maps[:3]] == ["all sources", "a", "b"]
    assert {axes.get_xlabel() for axes in maps} == {"expert"}
    assert "1: even use" in bar.get_ylabel()
    ExpertLog(tmp_path, 2).close()  # a resume goes back to step 2
    assert read_shares(tmp_path)[0] == 2
    rows = (tmp_path / "experts.jsonl").read_text().splitlines()
    assert [json.loads(row)["choices"] for row in rows] == [[4, 4, 0]]
