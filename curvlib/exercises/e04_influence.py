"""Checks of notebook 04: leave one out, influence, Woodbury, AUROC and the datamodeling score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from curvlib.exercises.core import Answer, Probe, close, exercise, hint, number, require, tensor
from curvlib.exercises.draws import randn, uniform


class Ridge(Probe):
    """Ridge regression on some of n rows; ``log`` holds how many rows each fit had."""

    def __init__(self, generator: Generator, n: int, lam: float) -> None:
        super().__init__()
        self.lam, self.x = lam, randn(generator, n, 3) * torch.tensor([2.0, 1.0, 0.5])
        self.y = self.x @ randn(generator, 3) + 0.5 * randn(generator, n)
        self.query = randn(generator, 3)
        self.target = self.weights(torch.ones(1, n).double())[0] @ self.query + uniform(generator, 1, 2)

    def weights(self, share: Tensor) -> Tensor:
        """One fit for each row of shares (fits, n); the sums are divided by n whatever the shares are."""
        H = torch.einsum("fn,np,nq->fpq", share, self.x, self.x) / len(self.x) + self.lam * torch.eye(3).double()
        weights: Tensor = torch.linalg.solve(H, (share * self.y) @ self.x / len(self.x))
        return weights

    def losses(self, share: Tensor) -> Tensor:
        """The query's loss after each fit."""
        return (self.weights(share) @ self.query - self.target) ** 2 / 2

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """The query's loss after a fit to these rows."""
        self.log.append(len(rows))
        return self.losses(torch.bincount(torch.tensor(rows), minlength=len(self.x)).double()[None])[0]

    def effects(self) -> Tensor:
        """Of each row: the query's loss with it minus the loss without it, by fitting again."""
        shares = torch.ones(len(self.x), len(self.x), dtype=torch.float64)
        return self.losses(shares[:1]) - self.losses(shares - torch.eye(len(self.x)))


@exercise(points=3)
def leave_one_out(answer: Answer, generator: Generator) -> None:
    """The fits are counted, and the effects are measured once more."""
    fit = Ridge(generator, 8, 0.1)
    value, (used, _) = answer.run(fit, 8)
    value, right = tensor(value, 8), fit.effects()
    require(not close(value, -right), "the sign is turned: loss with point i minus loss without it")
    require(1 not in used.log, "some fits had one point: train on all points but i, not on i alone")
    require(close(value, right), "an effect is the loss after training on all minus that on all but i")
    require(len(used.log) <= 9, f"right, with {len(used.log)} fits: the fit to all points is needed once", earned=2)


@exercise(points=6)
def influence_scores(answer: Answer, generator: Generator) -> None:
    """Against 200 fits, each with one point left out."""
    fit = Ridge(generator, 200, 0.5)
    theta, H = fit.weights(torch.ones(1, 200).double())[0], fit.x.T @ fit.x / 200
    rows = fit.x * (fit.x @ theta - fit.y)[:, None] / 200
    query = (fit.query @ theta - fit.target) * fit.query
    value, real = tensor(answer(rows, query, H, fit.lam), 200), fit.effects()
    require(not close(value, -rows @ query), "that is the plain dot product: solve with H + λI first")
    require(not close(value, -rows @ torch.linalg.solve(H, query)), "λ is missing: solve with H + λI")
    multiplied = any(close(value, -rows @ (H @ query + lam * query)) for lam in (0, fit.lam))
    require(not multiplied, "H was multiplied: the step to the new optimum divides by the curvature, so solve with it")
    agreement = float(torch.corrcoef(torch.stack([value, real]))[0, 1])
    require(agreement > -0.9, "the sign is turned: adding point i moves the optimum by -H⁻¹∇r_i")
    right = agreement > 0.99
    require(right, f"its correlation with training again is {agreement:.2f}: invert the matrix H + λI, not its entries")
    slope = float(value @ real / (value @ value))
    unit = 0.9 < slope < 1.1
    require(unit, f"the right order in the wrong unit: training again gives {slope:.2f} times as much", earned=3)


@exercise(points=7)
def woodbury_solve(answer: Answer, generator: Generator) -> None:
    """The product of the matrix with the answer must give the vector back, also where the matrix fits no memory."""
    U, v, lam = randn(generator, 4, 30), randn(generator, 30), uniform(generator, 0.3, 0.7)
    value = tensor(answer(U, lam, v), 30)
    error = U.T @ (U @ value) + lam * value - v
    require(not close(U.T @ (U @ value) + lam * value, lam * v), "the factor 1/λ in front is missing")
    inner = torch.linalg.lstsq(U.T, (v - lam * value)[:, None]).solution[:, 0]
    require(not close(U @ U.T @ inner + lam * inner, -U @ v), "a minus belongs before Uᵀ(…)⁻¹Uv")
    require(not close(U @ U.T @ inner + inner, U @ v), "the small matrix is UUᵀ + λI, not UUᵀ + I")
    relative = float(error.norm() / v.norm())
    require(relative < 1e-6, f"(UᵀU + λI) x must give v back: the relative error is {relative:.0e}")
    wide, long = randn(generator, 2, 400_000), randn(generator, 400_000)
    with hint("alloc", "400,000 × 400,000 numbers were asked for: form no matrix but the n × n matrix UUᵀ"):
        value = tensor(answer(wide, lam, long), 400_000)
    right = close(wide.T @ (wide @ value) + lam * value, long, 1e-4)
    require(right, "right for 30 parameters, wrong for 400,000: is a size written into the code?", earned=4)


@exercise(points=3)
def auroc(answer: Answer, generator: Generator) -> None:
    """All pairs of a poisoned and a clean chat."""
    poisoned = torch.arange(60) % 5 == 0
    ties = torch.randint(0, 5, (60,), generator=generator).double() + poisoned
    plain = (ties + 0.01 * torch.randperm(60, generator=generator)).double()

    def pairs(scores: Tensor) -> tuple[float, float]:
        gaps = scores[poisoned][:, None] - scores[~poisoned]
        return float((gaps > 0).double().mean()), float((gaps == 0).double().mean())

    value, (above, _) = number(answer(plain, poisoned)), pairs(plain)
    require(not close(value, 1 - above), "poison on top gives 0: the score is suspicion, and a high one accuses")
    top = float(poisoned[plain.topk(12).indices].double().mean())
    require(not close(value, top) or close(top, above), "that is the share of poison among the 12 most suspicious")
    require(close(number(answer(plain**3, poisoned)), value), "cubing the scores changed it: only the order counts")
    require(close(value, above), "it is the share of pairs (poisoned, clean) in which the poisoned chat scores higher")
    value, (above, equal) = number(answer(ties, poisoned)), pairs(ties)
    for share in (0, 1):
        require(not close(value, above + share * equal), "tied pairs know nothing: they count one half", earned=1)
    require(close(value, above + equal / 2), "where scores are tied, each tied pair counts one half", earned=1)


@exercise(points=5)
def datamodeling_score(answer: Answer, generator: Generator) -> None:
    """Exact influences score 1, whatever the losses' unit; a case with one swap is known by hand."""
    influences = randn(generator, 3, 20) + 0.5
    sizes = torch.randint(5, 16, (40,), generator=generator).tolist()
    subsets = [torch.randperm(20, generator=generator)[:size].tolist() for size in sizes]
    sums = torch.stack([influences[:, rows].sum(1) for rows in subsets], dim=1)

    def value(losses: Tensor, sets: list[list[int]] = subsets) -> float:
        return number(answer(influences, sets, losses))

    plain = value(sums)
    require(plain > -0.9, "-1 for exact influences: sum over the chats in the subset, not over those left out")
    offsets = torch.tensor([[0.0], [50.0], [-90.0]])
    level = close(value(sums + offsets), plain, 1e-4)
    require(level, "a query's level changed the score: rank within each query, then average")
    order = close(value(sums.exp()), plain, 1e-4)
    require(order, "exp of the losses changed the score: only their order counts, take ranks")
    sets = [rows[:5] for rows in subsets]
    equal = value(torch.stack([influences[:, rows].sum(1) for rows in sets], dim=1), sets)
    require(not (equal > 0.9999 > plain), "1 only where subsets are equally large: take sums over a subset, not means")
    require(plain > 0.9999, f"exact influences score 1, and you give {plain:.3f}")
    swapped = torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    ascending = torch.tensor([[0.0, 0.5, 1.0]] * 2, dtype=torch.float64)
    half = number(answer(ascending, [[0], [1], [2]], swapped))
    require(close(half, 0.75), f"ranks 1 2 3 and 1 3 2 correlate by one half: with 1, 0.75 on average, not {half:.2f}")
