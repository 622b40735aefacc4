"""K-FAC and EK-FAC where they must be exact, against dense matrices, and as preconditioners of a 4-bit model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvlib.batches import IGNORED, Batch
from curvlib.curvature.ggn import ggn
from curvlib.curvature.kfac import ekfac
from curvlib.curvature.kronecker import EKFAC
from curvlib.errors import CurvlibError

SYMBOLS, INPUTS = 6, 4


class SoftmaxRegression(nn.Module):
    """A frozen vector for each symbol, then one linear map to logits, called like a language model."""

    def __init__(self, classes: int, *, bias: bool = False, zero: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        vectors = torch.randn(SYMBOLS, INPUTS, generator=generator, dtype=torch.float64)
        self.config = None
        self.vectors = nn.Embedding.from_pretrained(vectors)
        self.linear = nn.Linear(INPUTS, classes, bias=bias, dtype=torch.float64)
        for parameter in self.linear.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = torch.zeros_like(values) if zero else values

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


def dense_fisher(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Mean outer product of the gradients of single answer tokens, by plain autograd."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        for symbol, label in batch.input_ids[:, -2:].tolist():
            loss = -model(torch.tensor([[symbol]])).logits[0, 0].log_softmax(dim=0)[label]
            gradient = torch.cat([piece.reshape(-1) for piece in torch.autograd.grad(loss, parameters)])
            total, count = total + gradient.outer(gradient), count + 1
    return total / count


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_exact_on_the_ggn_where_every_label_gives_the_same_square(bias: bool, corrected: bool) -> None:
    # two classes of probability 1/2 each: g g^T is the softmax Hessian for either label, so no sampling noise is left
    model = SoftmaxRegression(2, bias=bias, zero=True)
    batches = [one_token([0, 1, 2], padding=3), one_token([3]), one_token([4, 5])]
    fitted, exact = ekfac(model, batches, corrected=corrected).dense(), ggn(model, batches).dense()
    if corrected:  # the inputs' eigenvectors are those of the GGN, so its diagonal there is all of it
        torch.testing.assert_close(fitted.trace(), exact.trace())
    torch.testing.assert_close(fitted, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("corrected", [False, True])
def test_exact_on_the_empirical_fisher_of_one_example(corrected: bool) -> None:
    model, batches = SoftmaxRegression(3, bias=True), [one_token([2], label=1, padding=1)]
    fitted = ekfac(model, batches, fisher="empirical", corrected=corrected).dense()
    torch.testing.assert_close(fitted, dense_fisher(model, batches), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rank", [None, 2])
def test_correction_is_the_diagonal_and_never_farther_in_frobenius_norm(rank: int | None) -> None:
    model = SoftmaxRegression(3)
    batches = [one_token([0, 1, 2, 3], label=1), one_token([4, 5], label=2)]
    exact = dense_fisher(model, batches)
    corrected = ekfac(model, batches, fisher="empirical", rank=rank)
    plain = ekfac(model, batches, fisher="empirical", rank=rank, corrected=False)
    assert distance(corrected.dense(), exact) < 0.9 * distance(plain.dense(), exact)
    torch.testing.assert_close(corrected.dense().trace(), exact.trace())
    whole = ekfac(model, batches, fisher="empirical", corrected=False)
    torch.testing.assert_close(plain.dense().trace(), whole.dense().trace())
    assert corrected.damping_scale == pytest.approx(float(exact.trace()) / corrected.size)
    block = corrected.blocks[0]
    basis = torch.kron(block.left.vectors, block.right.vectors)
    kept = block.values[: block.left.vectors.shape[1], : block.right.vectors.shape[1]]
    torch.testing.assert_close((basis.T @ exact @ basis).diagonal(), kept.reshape(-1))


def test_sampled_labels_approach_the_ggn_and_empirical_ones_do_not() -> None:
    model, symbols = SoftmaxRegression(3), list(range(SYMBOLS))
    exact = ggn(model, [one_token(symbols)]).dense()
    many = [one_token(symbols * 500) for _ in range(4)]
    sampled = {corrected: ekfac(model, many, corrected=corrected) for corrected in (False, True)}
    assert distance(sampled[True].dense(), exact) < distance(sampled[False].dense(), exact)
    assert float(sampled[True].dense().trace()) == pytest.approx(float(exact.trace()), rel=0.03)
    empirical = ekfac(model, many, fisher="empirical").dense()
    assert abs(float(empirical.trace() / exact.trace()) - 1) > 0.2


@pytest.mark.parametrize("rank", [None, 2])
def test_inverses(rank: int | None) -> None:
    fitted = ekfac(SoftmaxRegression(5, bias=True), [one_token([0, 1, 2, 3, 4, 5])], rank=rank)
    damping = 0.1 * fitted.damping_scale
    identity = torch.eye(fitted.size, dtype=torch.float64)
    inverse, root = fitted.inverse(damping), fitted.inverse_sqrt(damping)
    torch.testing.assert_close(inverse @ fitted.damped(damping).dense(), identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(root @ root.dense(), inverse.dense())
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


def test_file_round_trip(tmp_path: Path) -> None:
    fitted = ekfac(SoftmaxRegression(3, bias=True), [one_token([0, 1, 2])], rank=2)
    v = torch.arange(float(fitted.size), dtype=torch.float64)
    fitted.save(tmp_path / "full")
    fitted.save(tmp_path / "half", half=True)
    assert torch.equal(EKFAC.load(tmp_path / "full").matvec(v), fitted.matvec(v))
    torch.testing.assert_close(EKFAC.load(tmp_path / "half").matvec(v), fitted.matvec(v), rtol=0.01, atol=0.01)
    (tmp_path / "full").write_bytes((tmp_path / "full").read_bytes()[:-40])
    for name in ("full", "absent"):
        with pytest.raises(CurvlibError, match=f"{name} is not an EK-FAC"):
            EKFAC.load(tmp_path / name)


class Misused(SoftmaxRegression):
    """The linear map runs twice in a pass, or not at all."""

    def __init__(self, uses: int) -> None:
        super().__init__(INPUTS)
        self.uses = uses
        self.head = nn.Linear(INPUTS, 3, dtype=torch.float64)

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | slice = slice(None), **_: Any) -> SimpleNamespace:
        x = self.vectors(input_ids)
        for _use in range(self.uses):
            x = self.linear(x)
        return SimpleNamespace(logits=self.head(x)[:, logits_to_keep])


class Head(SoftmaxRegression):
    """As a language model does, the linear map reads only the positions that are asked for."""

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor | slice = slice(None), **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.vectors(input_ids)[:, logits_to_keep]))


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
    model = SoftmaxRegression(3)
    model.vectors.requires_grad_(True)
    with pytest.raises(CurvlibError, match=r"vectors.weight is trainable"):
        ekfac(model, batches)
    tied = SoftmaxRegression(SYMBOLS)
    tied.linear.weight = tied.vectors.weight
    tied.linear.requires_grad_(True)
    with pytest.raises(CurvlibError, match="is trainable"):
        ekfac(tied, batches)
