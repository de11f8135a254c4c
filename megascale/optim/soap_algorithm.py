"""SOAP's steps: Adam in the eigenbasis of Shampoo's preconditioner.

Vyas et al., arXiv 2409.11321.

Letters in names: B matrices of a fused weight, N their rows, M their columns.

For the gradient G of a matrix, the averages L of G G^T and R of G^T G have the eigenvectors Q_L
and Q_R; Adam runs on Q_L^T G Q_R, and its step is turned back. Public packages were looked at:
NVIDIA's emerging-optimizers wants Python 3.12 and refreshes its bases in every step, and the SOAP
of pytorch-optimizer makes its state from the first gradient, where a checkpoint needs it before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

SIDES = {"left": -2, "right": -1}
"""A side's dimension of the gradient, the one that its basis turns."""


class Soap(torch.optim.Optimizer):
    """SOAP over whole matrices, with state in the dtype of the parameters, which is to be fp32.

    `shape` below is that of a matrix: a parameter of `fused` matrices on top of each other (an
    option of its group) has each of them preconditioned alone. A dimension above `max_dim` keeps
    the identity as its basis; what has not two dimensions gets plain Adam.

    As in the authors' code: the first step makes the bases and applies no update; in each later one
    the averages learn the gradient after the update, so no gradient is turned by itself; every
    `refresh_steps` updates the bases get one power iteration and a QR decomposition; eps is added
    to the root of the second moment before its bias is corrected; weight decay is applied after
    the update.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        refresh_steps: int = 10,
        max_dim: int = 10000,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        defaults |= {"refresh_steps": refresh_steps, "max_dim": max_dim}
        super().__init__(params, defaults | {"fused": 1, "step": 0})

    def init_state(self) -> None:
        """Make the state where there is none: zeros, and the identity as every basis."""
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight] = _new_state(weight, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter by its `grad`. `closure` is not supported and must be None."""
        assert closure is None
        self.init_state()
        for group in self.param_groups:
            group["step"] += 1
            for weight in group["params"]:
                gradient_BNM = matrices(weight.grad, group["fused"])
                state = self.state[weight]
                if group["step"] > 1:
                    _update(matrices(weight, group["fused"]), gradient_BNM, state, group)
                _learn(gradient_BNM, state, group)


def matrices(tensor: Tensor, fused: int) -> Tensor:
    """A view of `tensor` as its [fused, rows, columns]; of a vector as [1, 1, size]."""
    if tensor.dim() != 2:
        return tensor.view(1, 1, -1)
    return tensor.view(fused, -1, tensor.shape[1])


def _new_state(weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    state = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    if weight.dim() != 2:
        return state
    shape_BNM = matrices(weight, group["fused"]).shape
    for side, dim in SIDES.items():
        size = shape_BNM[dim]
        if size <= group["max_dim"]:
            identity = torch.eye(size, dtype=weight.dtype, device=weight.device)
            state[f"{side}_basis"] = identity.repeat(shape_BNM[0], 1, 1)
            state[f"{side}_average"] = torch.zeros_like(state[f"{side}_basis"])
    return state


def _update(
    weight_BNM: Tensor, gradient_BNM: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> None:
    """One step of Adam in the bases, then weight decay."""
    (beta1, beta2), lr, updates = group["betas"], group["lr"], group["step"] - 1
    turned_BNM = _into_bases(gradient_BNM, state)
    mean_BNM = state["exp_avg"].view_as(turned_BNM).lerp_(turned_BNM, 1 - beta1)
    square_BNM = state["exp_avg_sq"].view_as(turned_BNM)
    square_BNM.mul_(beta2).addcmul_(turned_BNM, turned_BNM, value=1 - beta2)
    size = lr * math.sqrt(1 - beta2**updates) / (1 - beta1**updates)
    step_BNM = _out_of_bases(mean_BNM / square_BNM.sqrt().add_(group["eps"]), state)
    weight_BNM.add_(step_BNM, alpha=-size).mul_(1 - lr * group["weight_decay"])


def _learn(gradient_BNM: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """Add the gradient to the averages; make the bases in step 1, refresh them when it is time."""
    updates, weight = group["step"] - 1, 1 - group["betas"][1]
    if "left_average" in state:
        state["left_average"].lerp_(gradient_BNM @ gradient_BNM.mT, weight)
    if "right_average" in state:
        state["right_average"].lerp_(gradient_BNM.mT @ gradient_BNM, weight)
    if updates == 0:
        for side in SIDES:
            if f"{side}_basis" in state:
                state[f"{side}_basis"].copy_(eigenbasis(state[f"{side}_average"]))
    elif updates % group["refresh_steps"] == 0:
        _refresh(state, gradient_BNM.shape)


def _refresh(state: dict[str, Tensor], shape_BNM: torch.Size) -> None:
    """Move the bases on. The mean of gradients is carried over; the mean of their squares, which
    no rotation can carry, keeps to its eigenvectors as their order changes."""
    mean_BNM = state["exp_avg"].view(shape_BNM)
    square_BNM = state["exp_avg_sq"].view(shape_BNM)
    unturned_BNM = _out_of_bases(mean_BNM, state)
    for side, dim in SIDES.items():
        if f"{side}_basis" in state:
            basis = state[f"{side}_basis"]
            new, order = refreshed_basis(state[f"{side}_average"], basis)
            basis.copy_(new)
            index = order.unsqueeze(-3 - dim)
            square_BNM.copy_(square_BNM.take_along_dim(index, dim))
    mean_BNM.copy_(_into_bases(unturned_BNM, state))


def eigenbasis(average: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices [B, D, D] as columns, of the largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(average).eigenvectors  # of the smallest first
    return vectors.flip(-1)


def refreshed_basis(average: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration from `basis` [B, D, D] towards the eigenvectors of `average`.

    Columns are put in descending order of their Rayleigh quotients before they are made
    orthogonal. Returns the new basis and that order, [B, D].
    """
    product = average @ basis
    order = (basis * product).sum(dim=-2).argsort(dim=-1, descending=True, stable=True)
    return torch.linalg.qr(product.take_along_dim(order.unsqueeze(-2), -1)).Q, order


def with_rows(state: Mapping[str, Tensor], kept: int, rows: int) -> dict[str, Tensor]:
    """State of a matrix of which the first `kept` rows stay and others have no gradient: of `rows`.

    `state` holds exp_avg, exp_avg_sq, left_average and left_basis. The mean of gradients is carried
    over exactly, that of their squares as if they were independent in the old basis.
    """
    average = state["left_average"].new_zeros(rows, rows)
    average[:kept, :kept] = state["left_average"][:kept, :kept]
    basis = torch.eye(rows, dtype=average.dtype, device=average.device)
    basis[:kept, :kept] = eigenbasis(average[:kept, :kept])
    turn = basis[:kept].mT @ state["left_basis"][:kept]
    mean, square = turn @ state["exp_avg"], turn.square() @ state["exp_avg_sq"]
    return {
        "exp_avg": mean,
        "exp_avg_sq": square,
        "left_average": average,
        "left_basis": basis,
    }


def _into_bases(tensor_BNM: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "left_basis" in state:
        tensor_BNM = state["left_basis"].mT @ tensor_BNM
    return tensor_BNM @ state["right_basis"] if "right_basis" in state else tensor_BNM


def _out_of_bases(tensor_BNM: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "left_basis" in state:
        tensor_BNM = state["left_basis"] @ tensor_BNM
    return tensor_BNM @ state["right_basis"].mT if "right_basis" in state else tensor_BNM
