"""K-FAC and EK-FAC where they must be exact, against dense matrices, and as preconditioners of a 4-bit model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlib.batches import IGNORED, Batch
from curvlib.curvature import kfac
from curvlib.curvature.ggn import ggn
from curvlib.curvature.kfac import ekfac
from curvlib.errors import CurvlibError

SYMBOLS, INPUTS = 6, 4


class SoftmaxRegression(nn.Module):
    """A frozen vector for each symbol, then one linear map to logits, called like a language model."""

    def __init__(self, classes: int, *, zero: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        vectors = torch.randn(SYMBOLS, INPUTS, generator=generator, dtype=torch.float64)
        self.config = None
        self.vectors = nn.Embedding.from_pretrained(vectors)
        self.linear = nn.Linear(INPUTS, classes, bias=False, dtype=torch.float64)
        values = torch.randn(self.linear.weight.shape, generator=generator, dtype=torch.float64)
        self.linear.weight.data = torch.zeros_like(values) if zero else values

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | slice = slice(None), **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.vectors(input_ids))[:, logits_to_keep])


def one_token(symbols: list[int], label: int = 0, padding: int = 0) -> Batch:
    """One chat a symbol, each with one answer token, behind columns of padding."""
    width = padding + 2
    ids = torch.zeros(len(symbols), width, dtype=torch.int64)
    ids[:, -2], ids[:, -1] = torch.tensor(symbols), label
    attention = (torch.arange(width) >= padding).long().expand_as(ids)
    labels = torch.where(torch.arange(width) == width - 1, ids, torch.full_like(ids, IGNORED))
    return Batch(ids, attention, labels)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


BATCHES = [one_token([0, 1, 2], padding=3), one_token([3]), one_token([4, 5])]
SHARES = (0.5, 3.0, 2.0)


@pytest.mark.parametrize("weights", [None, SHARES])
def test_exact_on_the_ggn_where_every_label_gives_the_same_square(weights: tuple[float, ...] | None) -> None:
    # two classes of probability 1/2 each: g g^T is the softmax Hessian for either label, so no sampling noise is left
    model = SoftmaxRegression(2, zero=True)
    exact = ggn(model, BATCHES)
    if weights:
        exact.weights = [batch.tokens * weight for batch, weight in zip(BATCHES, weights, strict=True)]
    scale = exact.weight / 6  # the operator divides by the sum of its weights, EK-FAC by the tokens
    fitted = ekfac(model, BATCHES, weights=weights).dense()
    torch.testing.assert_close(fitted, scale * exact.dense(), rtol=0, atol=1e-14)
    if weights:
        assert distance(ekfac(model, BATCHES).dense(), fitted) > 0.1


@pytest.mark.parametrize("rank", [None, 2])
def test_eigenvalues_are_the_diagonal_in_any_basis(rank: int | None) -> None:
    model = SoftmaxRegression(2, zero=True)
    exact, fitted = ggn(model, BATCHES).dense(), ekfac(model, BATCHES, rank=rank)
    torch.testing.assert_close(fitted.dense().trace(), exact.trace())
    assert fitted.damping_scale == pytest.approx(float(exact.trace()) / fitted.size)
    block = fitted.blocks[0]
    basis = torch.kron(block.left.vectors.contiguous(), block.right.vectors.contiguous())
    kept = block.values[: block.left.vectors.shape[1], : block.right.vectors.shape[1]]
    torch.testing.assert_close((basis.T @ exact @ basis).diagonal(), kept.reshape(-1))
    values = torch.linalg.eigvalsh(fitted.dense())
    for limit in (0.5 * float(values[-1]), 1e-9, 2 * float(values[-1])):
        assert fitted.above(limit) == int((values > limit).sum())


def test_sampled_labels_approach_the_ggn() -> None:
    model, symbols = SoftmaxRegression(3), list(range(SYMBOLS))
    exact = ggn(model, [one_token(symbols)]).dense()
    few, many = (ekfac(model, [one_token(symbols * copies) for _ in range(4)]).dense() for copies in (1, 500))
    assert float(many.trace()) == pytest.approx(float(exact.trace()), rel=0.03)
    assert distance(many, exact) < distance(few, exact)


@pytest.mark.parametrize("rank", [None, 2])
def test_inverses(rank: int | None) -> None:
    fitted = ekfac(SoftmaxRegression(5), [one_token([0, 1, 2, 3, 4, 5])], rank=rank)
    damping = 0.1 * fitted.damping_scale
    identity = torch.eye(fitted.size, dtype=torch.float64)
    torch.testing.assert_close(fitted.inverse(damping) @ fitted.damped(damping).dense(), identity, rtol=0, atol=1e-12)
    assert float(torch.linalg.eigvalsh(fitted.dense())[0]) > -1e-14
    with pytest.raises(CurvlibError, match="expected a number > 0"):
        fitted.inverse(0.0)


def test_labels_are_seeded_without_touching_the_global_state() -> None:
    model, batches, state = SoftmaxRegression(3), [one_token([0, 1, 2])], torch.get_rng_state()
    runs = [ekfac(model, batches, seed=seed).dense() for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    assert torch.equal(state, torch.get_rng_state())
    assert model.linear.weight.grad is None


def test_without_any_whole_factor_the_model_is_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # two symbols span two of four inputs, three classes have three outputs: three columns lose nothing
    model, batches = SoftmaxRegression(3).to(device), [one_token([0, 1, 1, 0]), one_token([1])]
    whole, other = (ekfac(model, batches, rank=3, seed=seed).dense() for seed in (0, 1))
    shapes, count = set[tuple[int, ...]](), kfac._factors

    def watched(*arguments: Any) -> Any:
        factors, owners = count(*arguments)
        shapes.update(tuple(factor.shape) for factor in factors.values())
        return factors, owners

    monkeypatch.setattr(kfac, "_factors", watched)
    monkeypatch.setattr(kfac, "WHOLE", 0)
    torch.testing.assert_close(ekfac(model, batches, rank=3, seed=0).dense(), whole)
    assert shapes == {(INPUTS, 3), (3, 3)}
    assert distance(other, whole) > 0.01  # so that labels of another pass would be seen


class Misused(SoftmaxRegression):
    """The linear map runs twice in a pass, or not at all."""

    def __init__(self, uses: int) -> None:
        super().__init__(INPUTS)
        self.uses = uses
        self.head = nn.Linear(INPUTS, 3, bias=False, dtype=torch.float64)

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | slice = slice(None), **_: Any) -> SimpleNamespace:
        x = self.vectors(input_ids)
        for _use in range(self.uses):
            x = self.linear(x)
        return SimpleNamespace(logits=self.head(x)[:, logits_to_keep])


class Head(SoftmaxRegression):
    """As a language model does, the linear map reads only the positions that are asked for."""

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | slice = slice(None), **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.vectors(input_ids)[:, logits_to_keep]))


class Flat(SoftmaxRegression):
    """As OPT's feed-forward does, the linear map reads the positions of all chats in one row."""

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | slice = slice(None), **_: Any) -> SimpleNamespace:
        x = self.vectors(input_ids)
        return SimpleNamespace(logits=self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])[:, logits_to_keep])


def test_a_head_that_reads_only_some_positions_counts_those_before_answers() -> None:
    batches = [one_token([0, 1, 4]), one_token([2, 3], padding=2)]
    everywhere, at_answers = (ekfac(kind(3), batches) for kind in (SoftmaxRegression, Head))
    v = torch.randn(everywhere.size, dtype=torch.float64)
    torch.testing.assert_close(at_answers.matvec(v), everywhere.matvec(v))


def test_what_has_no_kronecker_form_is_refused() -> None:
    batches = [one_token([0, 1])]
    with pytest.raises(CurvlibError, match="linear runs twice"):
        ekfac(Misused(2), batches)
    with pytest.raises(CurvlibError, match="linear takes no part"):
        ekfac(Misused(0), batches)
    with pytest.raises(CurvlibError, match=r"linear reads inputs of shape \(4, \d+\), expected \(chat, position"):
        ekfac(Flat(3), batches)
    model = SoftmaxRegression(3)
    model.vectors.requires_grad_(True)
    with pytest.raises(CurvlibError, match=r"vectors.weight is trainable"):
        ekfac(model, batches)
    tied = SoftmaxRegression(SYMBOLS)
    tied.linear.weight = tied.vectors.weight
    tied.linear.requires_grad_(True)
    with pytest.raises(CurvlibError, match="is trainable"):
        ekfac(tied, batches)
