"""SOAP against a slow reference in double precision, Adam, and what must hold of its bases."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megascale.optim.fused import fuse, is_fused
from megascale.optim.soap_algorithm import Soap, matrices, with_rows

OPTIONS = {"betas": (0.9, 0.95), "lr": 0.02, "weight_decay": 0.1, "refresh_steps": 3}
SQUARE, WIDE, TALL, VECTOR = (5, 5), (4, 9), (9, 4), (6,)


class SlowSoap:
    """SOAP of one matrix as the paper has it: momentum in the space of the weights, one basis of
    Kronecker products, the eigenvectors of averages made of outer products of columns and rows."""

    def __init__(self, weight: np.ndarray, max_dim: int) -> None:
        self.weight, self.max_dim = weight.copy(), max_dim
        self.averages = [np.zeros((size, size)) for size in weight.shape]
        self.bases = [np.eye(size) for size in weight.shape]
        self.mean, self.square = np.zeros(weight.size), np.zeros(weight.size)
        self.steps = 0

    def step(self, gradient: np.ndarray, first_bases: list[np.ndarray] | None = None) -> None:
        """`first_bases` are taken in the first step, where a null space has no basis of its own."""
        (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
        self.steps += 1
        if self.steps > 1:
            updates, basis = self.steps - 1, np.kron(*self.bases)
            self.mean = beta1 * self.mean + (1 - beta1) * gradient.ravel()
            turned = basis.T @ gradient.ravel()
            self.square = beta2 * self.square + (1 - beta2) * turned**2
            mean = basis.T @ self.mean / (1 - beta1**updates)
            root = (np.sqrt(self.square) + 1e-8) / np.sqrt(1 - beta2**updates)
            self.weight -= lr * (basis @ (mean / root)).reshape(self.weight.shape)
            self.weight -= lr * OPTIONS["weight_decay"] * self.weight
        for average, vectors in zip(self.averages, (gradient.T, gradient)):
            outer = sum(np.outer(vector, vector) for vector in vectors)
            average[:] = beta2 * average + (1 - beta2) * outer
        if self.steps == 1:
            self.bases = first_bases or [self._first(side) for side in (0, 1)]
        elif (self.steps - 1) % OPTIONS["refresh_steps"] == 0:
            for side in (0, 1):
                self._refresh(side)

    def _first(self, side: int) -> np.ndarray:
        if len(self.averages[side]) > self.max_dim:
            return self.bases[side]
        return np.linalg.eigh(self.averages[side])[1][:, ::-1]

    def _refresh(self, side: int) -> None:
        basis, average = self.bases[side], self.averages[side]
        if len(average) > self.max_dim:
            return
        order = sorted(range(len(average)), key=lambda i: -(basis[:, i] @ average @ basis[:, i]))
        self.bases[side] = np.linalg.qr(average @ basis[:, order])[0]
        square = self.square.reshape(self.weight.shape)
        self.square = np.take(square, order, axis=side).ravel()


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(7)
    return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))


def gradients(shape: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray:
    """Normal, with rows and columns of very different sizes."""
    noise = np.random.default_rng(seed).normal(size=(count, *shape))
    return noise * np.logspace(0, -1, shape[-1]) * np.logspace(0, -1, shape[0])[:, None]


def run(soap: Soap, weight: torch.nn.Parameter, given: np.ndarray) -> np.ndarray:
    """Take a step with each gradient; the weights after each."""
    after = []
    for gradient in given:
        weight.grad = torch.from_numpy(gradient).to(weight.dtype)
        soap.step()
        after.append(weight.detach().double().numpy().copy())
    return np.stack(after)


@pytest.mark.parametrize(
    "shape, max_dim", [(SQUARE, 10), (WIDE, 4), (TALL, 4), (SQUARE, 0), ((1, 1), 10)]
)
def test_it_follows_the_slow_reference(shape, max_dim) -> None:
    weight, given = parameter(shape), gradients(shape, 40)
    slow = SlowSoap(weight.detach().numpy(), max_dim)
    after = run(Soap([{"params": [weight]}], max_dim=max_dim, **OPTIONS), weight, given)
    for gradient, found in zip(given, after):
        slow.step(gradient)
        np.testing.assert_allclose(found, slow.weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_it_follows_the_slow_reference_with_both_sides(shape) -> None:
    """The first gradient has too low a rank to name all eigenvectors, so these are compared as
    what they do, and the reference goes on from them."""
    weight, given = parameter(shape), gradients(shape, 40)
    slow = SlowSoap(weight.detach().numpy(), 10)
    soap = Soap([{"params": [weight]}], **OPTIONS)
    run(soap, weight, given[:1])
    bases = [soap.state[weight][f"{side}_basis"][0].numpy().copy() for side in ("left", "right")]
    slow.step(given[0], bases)
    for basis, average in zip(bases, slow.averages):
        values = np.linalg.eigvalsh(average)[::-1]
        np.testing.assert_allclose(basis.T @ average @ basis, np.diag(values), atol=1e-12)
    for gradient, found in zip(given[1:], run(soap, weight, given[1:])):
        slow.step(gradient)
        np.testing.assert_allclose(found, slow.weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape, max_dim", [(SQUARE, 0), (WIDE, 3), (VECTOR, 10)])
def test_without_bases_it_is_adam_a_step_late_and_decay_after_it(shape, max_dim) -> None:
    weight, twin = parameter(shape), parameter(shape)
    given = np.random.default_rng(0).normal(size=(9, *shape))
    after = run(Soap([{"params": [weight]}], max_dim=max_dim, eps=0.0, **OPTIONS), weight, given)
    adam = torch.optim.Adam([twin], lr=OPTIONS["lr"], betas=OPTIONS["betas"], eps=0.0)
    np.testing.assert_array_equal(after[0], twin.detach().numpy())
    for gradient, found in zip(given[1:], after[1:]):
        twin.grad = torch.from_numpy(gradient)
        adam.step()
        twin.data.mul_(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
        np.testing.assert_allclose(found, twin.detach().numpy(), rtol=1e-10)


def test_it_turns_with_the_coordinates() -> None:
    """What Adam does not: turned gradients give turned steps."""
    left, right = (np.linalg.qr(gradients(SQUARE, 1, seed)[0])[0] for seed in (1, 2))
    given = gradients(SQUARE, 30)
    plain, turned = parameter(SQUARE), parameter(SQUARE)
    turned.data = torch.from_numpy(left) @ turned.data @ torch.from_numpy(right)
    after = run(Soap([{"params": [plain]}], **OPTIONS), plain, given)
    of_turned = run(Soap([{"params": [turned]}], **OPTIONS), turned, left @ given @ right)
    np.testing.assert_allclose(of_turned, left @ after @ right, rtol=1e-6, atol=1e-8)


def test_bases_stay_orthonormal_in_single_precision_and_find_the_eigenvectors() -> None:
    """Columns in descending order of what the averages are along them."""
    shape = (12, 20)
    weight = parameter(shape, torch.float32)
    soap = Soap([{"params": [weight]}], **OPTIONS | {"betas": (0.9, 0.999)})
    run(soap, weight, 1e-6 * gradients(shape, 1500))
    for side in ("left", "right"):
        basis, average = (soap.state[weight][f"{side}_{what}"][0] for what in ("basis", "average"))
        basis, average = basis.double(), average.double()
        identity = torch.eye(len(basis), dtype=torch.float64)
        assert (basis.T @ basis - identity).abs().max() < 1e-5
        along = basis.T @ average @ basis
        assert (along.diag().diff() < 0).all()
        values = torch.linalg.eigvalsh(average).flip(0)
        assert torch.allclose(along.diag(), values, rtol=0.05)


def test_a_gradient_of_zeros_does_no_harm() -> None:
    """Experts without tokens have one."""
    weight = parameter(WIDE, torch.float32)
    soap = Soap([{"params": [weight]}], **OPTIONS | {"weight_decay": 0.0})
    before = weight.detach().numpy().copy()
    assert (run(soap, weight, np.zeros((8, *WIDE))) == before).all()
    assert np.isfinite(run(soap, weight, gradients(WIDE, 8))).all()


def test_fused_matrices_are_preconditioned_apart() -> None:
    halves, given = [parameter(SQUARE), parameter(SQUARE)], gradients((10, 5), 12)
    halves[1].data += 1
    whole = torch.nn.Parameter(torch.cat([half.detach() for half in halves]))
    after = run(Soap([{"params": [whole], "fused": 2}], **OPTIONS), whole, given)
    for index, half in enumerate(halves):
        rows = slice(5 * index, 5 * index + 5)
        alone = run(Soap([{"params": [half]}], **OPTIONS), half, given[:, rows])
        np.testing.assert_allclose(after[:, rows], alone, rtol=1e-9)
    assert matrices(whole, 2).shape == (2, 5, 5) and matrices(torch.ones(3), 2).shape == (1, 1, 3)


def test_state_may_be_made_before_the_first_step() -> None:
    """As saving and loading do."""
    weight, twin, given = parameter(WIDE), parameter(WIDE), gradients(WIDE, 5)
    early = Soap([{"params": [twin]}], **OPTIONS)
    early.init_state()
    late = run(Soap([{"params": [weight]}], **OPTIONS), weight, given)
    np.testing.assert_array_equal(run(early, twin, given), late)


def test_other_rows_keep_the_means_of_those_that_stay() -> None:
    torch.manual_seed(0)
    kept, old, columns = 5, 8, 3
    gradients = torch.randn(50, old, columns, dtype=torch.float64)
    average = (gradients @ gradients.mT).mean(dim=0)
    basis = torch.linalg.qr(torch.randn(old, old, dtype=torch.float64)).Q
    mean, square = torch.randn(2, old, columns, dtype=torch.float64)
    state = {"exp_avg": mean, "exp_avg_sq": square.square()}
    state |= {"left_average": average, "left_basis": basis}
    for rows in (kept, 7, old, 11):
        new = with_rows(state, kept, rows)
        turned = new["left_basis"] @ new["exp_avg"]
        torch.testing.assert_close(turned[:kept], (basis @ mean)[:kept])
        assert turned.shape == (rows, columns) and not turned[kept:].any()
        torch.testing.assert_close(
            new["left_basis"].mT @ new["left_basis"], torch.eye(rows, dtype=torch.float64)
        )
        diagonal = new["left_basis"].mT @ new["left_average"] @ new["left_basis"]
        torch.testing.assert_close(diagonal, diagonal.diagonal().diag(), rtol=0, atol=1e-9)
        turn = new["left_basis"][:kept].mT @ basis[:kept]
        for row, column in itertools.product(range(rows), range(columns)):
            variance = sum(turn[row, i] ** 2 * square[i, column] ** 2 for i in range(old))
            assert new["exp_avg_sq"][row, column] == pytest.approx(float(variance))


def test_its_fused_matrices_are_not_taken_for_a_fused_kernel() -> None:
    """A rank may keep none but fused matrices, and must go the way of the others."""
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    group = {"params": [weight], "fused": 2}
    soap = SimpleNamespace(optimizer=Soap([group], **OPTIONS))
    adam = SimpleNamespace(optimizer=torch.optim.AdamW([weight]))
    assert not is_fused([soap]) and not is_fused([adam]) and not is_fused([])
    fuse([soap, adam])
    assert soap.optimizer.param_groups[0]["fused"] == 2
    assert is_fused([adam]) and not is_fused([adam, soap])
