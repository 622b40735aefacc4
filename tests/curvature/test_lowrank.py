"""Gradients of single chats against one pass each, the low-rank Fisher matrix against dense algebra and in the mean."""

from __future__ import annotations

import pytest
import torch

from curvlib.batches import answer_loss
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import ggn
from curvlib.curvature.lowrank import LowRankOperator, _home, chat_gradients, sampled_fisher
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable
from tests import cases

ROWS = cases.random(4, 9)


def test_products_and_inverse_are_those_of_the_dense_matrix() -> None:
    operator, v = LowRankOperator(ROWS), cases.random(9, seed=1)
    dense = ROWS.T @ ROWS
    assert cases.relative_error(operator.matvec(v), dense @ v) < 1e-14
    solved = torch.linalg.solve(dense + 0.3 * torch.eye(9, dtype=torch.float64), v)
    assert cases.relative_error(operator.inverse(0.3).matvec(v), solved) < 1e-12
    assert operator.scale == pytest.approx(float(torch.linalg.eigvalsh(dense)[-4:].mean()))


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_no_inverse_without_damping(damping: float) -> None:
    with pytest.raises(CurvlibError, match="expected a positive number"):
        LowRankOperator(ROWS).inverse(damping)


def test_rows_that_fill_a_gpu_stay_on_the_host(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, host = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (800, 1000))
    assert [_home(needed, gpu) for needed in (100, 101)] == [gpu, host]
    assert _home(101, host) == host
    v = cases.random(9, seed=1).to(device)
    here, there = LowRankOperator(ROWS.to(device)), LowRankOperator(ROWS)
    for mine, other in ((here, there), (here.inverse(0.3), there.inverse(0.3))):
        assert mine.matvec(v).device == other.matvec(v).device == v.device
        assert cases.relative_error(mine.matvec(v), other.matvec(v)) < 1e-12


def test_sampled_fisher_estimates_the_gauss_newton_matrix(device: str) -> None:
    model, batches = cases.pair(device)[0], cases.batches(3)
    fisher, exact = sampled_fisher(model, batches, samples=600, seed=0), ggn(model, batches)
    v = cases.random(exact.size, dtype=torch.float32).to(device)
    form = float(v @ exact.matvec(v))
    shares = (fisher.rows @ v).square()
    error = float(shares.std() * len(shares) ** 0.5)  # of the sum over the rows
    assert abs(float(v @ fisher.matvec(v)) - form) < 4 * error
    assert error < 0.1 * form  # so that a wrong scale would be seen


def test_the_seed_decides_the_labels(device: str) -> None:
    model, batches = cases.pair(device)[0], cases.batches(2)
    first, again, other = (sampled_fisher(model, batches, seed=seed).rows for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("which", [0, 1], ids=["NF4", "dense"])
def test_each_row_is_the_gradient_of_one_chat(which: int, device: str) -> None:
    model, batches = cases.pair(device)[which], cases.batches(3)
    for batch in batches:
        rows = chat_gradients(model, batch)
        for number, row in enumerate(rows):
            chat = batch.rows(number, number + 1)
            alone = flat_gradient(answer_loss(model, chat) * chat.tokens, list(trainable(model).values()))
            assert cases.relative_error(row, alone) < 1e-5


def test_a_frozen_map_of_a_pair_has_no_place_in_the_rows() -> None:
    model, batch = cases.nf4_llama(), cases.batches(2)[0]
    whole, start, kept = chat_gradients(model, batch), 0, []
    for name, weight in trainable(model).items():
        kept += list(range(start, start + weight.numel())) if "lora_B" in name else []
        start += weight.numel()
    for name, weight in list(trainable(model).items()):
        weight.requires_grad_("lora_B" in name)
    assert cases.relative_error(chat_gradients(model, batch), whole[:, kept]) < 1e-5


def test_rows_are_the_same_where_the_embeddings_are_made_to_require_a_gradient() -> None:
    model, batch = cases.nf4_llama(), cases.batches(2)[0]
    rows = chat_gradients(model, batch)
    model.enable_input_require_grads()
    assert torch.equal(chat_gradients(model, batch), rows)


def test_sampled_answers_change_with_their_generator_alone() -> None:
    model, batch = cases.pair()[0], cases.batches(2)[0]
    drawn = [
        chat_gradients(model, batch, fisher="sampled", labels=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_several_draws_are_those_of_one_generator_one_after_the_other() -> None:
    model, batch = cases.pair()[0], cases.batches(2)[0]

    def drawn(labels: torch.Generator, draws: int) -> torch.Tensor:
        return chat_gradients(model, batch, fisher="sampled", labels=labels, draws=draws)

    one_by_one = torch.Generator().manual_seed(0)
    apart = torch.cat([drawn(one_by_one, 1) for _ in range(3)])
    assert cases.relative_error(drawn(torch.Generator().manual_seed(0), 3), apart) < 1e-6
    assert cases.relative_error(apart[: len(batch)], apart[len(batch) : 2 * len(batch)]) > 1e-2
