"""The loss without logits, against the plain one that keeps them all."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.model import counts
from megascale.model.linear_cross_entropy import VocabularyPart, linear_cross_entropy

TOKENS, WIDTH, ROWS = 300, 16, 200
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def chunks_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 tokens are two whole chunks and one of 44."""
    monkeypatch.setattr(counts, "LOSS_CHUNK_BYTES", 1)


def drawn(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """(hidden states, weights, targets, mask with zeros and a weight of 0.25)."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 150, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) < 0.7).float()
    mask[:1] = 0.25
    return [hidden.to(dtype), weight.to(dtype), targets, mask]


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    part: VocabularyPart,
) -> torch.Tensor:
    logits = (hidden @ weight[: part.known].T).to(torch.promote_types(hidden.dtype, torch.float32))
    return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * mask).sum()


def differentiated(
    function: Callable[..., torch.Tensor], given: list[torch.Tensor], part: VocabularyPart
) -> Result:
    """(sum, gradient of hidden states, gradient of weights) of twice the sum."""
    hidden, weight = (given[0].clone().requires_grad_(), given[1].clone().requires_grad_())
    loss = function(hidden, weight, *given[2:], part)
    (2 * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tokens", [TOKENS, 256, 1, 0])
@pytest.mark.parametrize("part", [(ROWS, ROWS), (ROWS, 151), (160, 151), (151, 151)])
def test_sum_and_gradients_are_those_of_all_logits(
    chunks_of_128: None, tokens: int, part: tuple[int, int]
) -> None:
    """Also with rows that belong to no id, in the product or left out of it."""
    given, held = drawn(tokens), VocabularyPart(*part)
    found = differentiated(linear_cross_entropy, given, held)
    for mine, theirs in zip(found, differentiated(plain, given, held), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert not found[2][held.known :].any()


def test_one_chunk_and_several_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    given, part = drawn(), VocabularyPart(ROWS, ROWS)
    whole = differentiated(linear_cross_entropy, given, part)
    monkeypatch.setattr(counts, "LOSS_CHUNK_BYTES", 1)
    for mine, theirs in zip(differentiated(linear_cross_entropy, given, part), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_gradient_of_weights_goes_to_the_buffer_of_megatron_core(is_tied: bool) -> None:
    """There it is added in fp32 to what is in it. Autograd gets only what a tied embedding adds,
    which megatron-core's hook then adds too."""
    given, part = drawn(dtype=torch.bfloat16), VocabularyPart(ROWS, ROWS)
    _, _, rounded = differentiated(linear_cross_entropy, given, part)
    weight = given[1].requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(ROWS, WIDTH), False
    loss = 2 * linear_cross_entropy(given[0], weight, *given[2:], part)
    (loss + weight.sum() if is_tied else loss).backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None and (weight.grad == is_tied).all()
    added = weight.main_grad - 1
    torch.testing.assert_close(added, rounded.float(), rtol=2**-8, atol=1e-5)
    assert not torch.equal(weight.main_grad, 1 + rounded.float())


def test_frozen_weights_get_no_gradient() -> None:
    hidden, weight, *others = drawn()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(ROWS, WIDTH), False
    part = VocabularyPart(ROWS, ROWS)
    linear_cross_entropy(hidden.requires_grad_(), weight, *others, part).backward()
    assert hidden.grad is not None and hidden.grad.any()
    assert weight.grad is None and not weight.main_grad.any()


def test_bf16_is_no_further_from_the_truth_than_all_logits(chunks_of_128: None) -> None:
    """The truth is in fp64, with hidden states and weights that bf16 can write. Chunks are added
    in fp32, so that their number costs nothing."""
    part = VocabularyPart(ROWS, ROWS)
    given = drawn(dtype=torch.bfloat16)
    exact = [given[0].double(), given[1].double(), *given[2:]]
    truth = differentiated(plain, exact, part)
    mine, theirs = (differentiated(f, given, part) for f in (linear_cross_entropy, plain))
    assert [x.dtype for x in mine] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, other, true in zip(mine, theirs, truth, strict=True):
        ours_off, other_off = ((x.double() - true).norm().item() for x in (ours, other))
        assert ours_off <= 1.1 * other_off + 1e-6 * true.norm().item()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, storage)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_logits_of_all_tokens(chunks_of_128: None, dtype: torch.dtype) -> None:
    given, part = drawn(4 * TOKENS, dtype), VocabularyPart(ROWS, ROWS)
    with Largest() as plain_largest:
        differentiated(plain, given, part)
    assert plain_largest.elements == 4 * TOKENS * ROWS
    with Largest() as largest:
        differentiated(linear_cross_entropy, given, part)
    assert largest.elements == 128 * ROWS > 4 * TOKENS * WIDTH


def test_evaluation_computes_no_gradient() -> None:
    given, part = drawn(), VocabularyPart(ROWS, ROWS)
    weight = given[1].requires_grad_()
    with torch.no_grad(), Largest() as largest:
        loss = linear_cross_entropy(given[0], weight, *given[2:], part)
    assert not loss.requires_grad and largest.elements == TOKENS * ROWS
    torch.testing.assert_close(loss, plain(*given, part).detach(), rtol=1e-12, atol=0)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, *others = drawn()
    loss = linear_cross_entropy(hidden.requires_grad_(), *others, VocabularyPart(ROWS, ROWS))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_logits_that_are_not_numbers_show_in_the_sum() -> None:
    hidden, *others = drawn()
    hidden[7] = float("nan")
    assert linear_cross_entropy(hidden, *others, VocabularyPart(ROWS, ROWS)).isnan()


def test_chunks_are_bounded_in_bytes_and_whole_tiles() -> None:
    assert counts.loss_chunk_tokens(128_256, 2) == 2048
    assert counts.loss_chunk_tokens(128_256, 4) == 1024
    assert counts.loss_chunk_tokens(16_032, 2) == 16_640
    assert counts.loss_chunk_tokens(257, 4) > 500_000
    assert counts.loss_chunk_tokens(10**9, 4) == 128
