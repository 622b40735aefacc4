"""Checks of notebook 04: leave one out, influence, Woodbury, AUROC and the datamodeling score."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.exercises.core import Answer, Draw, Probe, close, hint, number, refuse, require, tensor


def ridge(x: Tensor, y: Tensor, lam: float, rows: Sequence[int]) -> Tensor:
    """The weights of a fit to these rows; the sums are divided by n whatever the rows are."""
    some = x[list(rows)]
    weights: Tensor = torch.linalg.solve(some.T @ some / len(x) + lam * torch.eye(3), some.T @ y[list(rows)] / len(x))
    return weights


def query_loss(x: Tensor, y: Tensor, lam: float, query: Tensor, target: Tensor, rows: Sequence[int]) -> Tensor:
    """The query's loss after such a fit."""
    return (ridge(x, y, lam, rows) @ query - target) ** 2 / 2


def regression(draw: Draw, n: int, lam: float) -> tuple[tuple[Any, ...], Tensor]:
    """What a query's loss is computed from, and of each row: that loss with it minus without it, by fitting again."""
    x, query = draw.normal(n, 3) * torch.tensor([2.0, 1.0, 0.5]), draw.normal(3)
    y = x @ draw.normal(3) + 0.5 * draw.normal(n)
    data = (x, y, lam, query, ridge(x, y, lam, range(n)) @ query + draw.uniform(1, 2))
    without = [query_loss(*data, [j for j in range(n) if j != i]) for i in range(n)]
    return data, query_loss(*data, range(n)) - torch.stack(without)


def leave_one_out(answer: Answer, draw: Draw) -> None:
    """The fits are counted, and the effects are measured once more."""
    data, right = regression(draw, 8, 0.1)
    value, (fit, _) = answer.run(Probe(query_loss, *data), 8)
    value = tensor(value, 8)
    refuse(value, "the sign is turned: loss with point i minus loss without it", -right)
    single = any(len(rows) == 1 for rows, _ in fit.log)
    require(not single, "some fits had one point: train on all points but i, not on i alone")
    require(close(value, right), "an effect is the loss after training on all minus that on all but i")
    require(len(fit.log) <= 9, f"right, with {len(fit.log)} fits: the fit to all points is needed once", earned=2)


def influence_scores(answer: Answer, draw: Draw) -> None:
    """Against 200 fits, each with one point left out."""
    (x, y, lam, query, target), real = regression(draw, 200, 0.5)
    theta, H = ridge(x, y, lam, range(200)), x.T @ x / 200
    rows, pull = x * (x @ theta - y)[:, None] / 200, (query @ theta - target) * query
    value = tensor(answer(rows, pull, H, lam), 200)
    multiplied = [-rows @ (H @ pull + each * pull) for each in (0, lam)]
    refuse(value, "that is the plain dot product: solve with H + λI first", -rows @ pull)
    refuse(value, "λ is missing: solve with H + λI", -rows @ torch.linalg.solve(H, pull))
    refuse(value, "H was multiplied: the step to the new optimum divides by the curvature, so solve", *multiplied)
    agreement, slope = torch.corrcoef(torch.stack([value, real]))[0, 1], value @ real / (value @ value)
    require(agreement > -0.9, "the sign is turned: adding point i moves the optimum by -H⁻¹∇r_i")
    entries = "invert the matrix H + λI, not its entries"
    require(agreement > 0.99, f"its correlation with training again is {agreement:.2f}: {entries}")
    unit = 0.9 < slope < 1.1
    require(unit, f"the right order in the wrong unit: training again gives {slope:.2f} times as much", earned=3)


def woodbury_solve(answer: Answer, draw: Draw) -> None:
    """The product of the matrix with the answer must give the vector back, also where the matrix fits no memory."""
    U, v, lam = draw.normal(4, 30), draw.normal(30), draw.uniform(0.3, 0.7)
    value = tensor(answer(U, lam, v), 30)
    back, inner = U.T @ (U @ value) + lam * value, torch.linalg.lstsq(U.T, (v - lam * value)[:, None]).solution[:, 0]
    refuse(back, "the factor 1/λ in front is missing", lam * v)
    refuse(U @ U.T @ inner + lam * inner, "a minus belongs before Uᵀ(…)⁻¹Uv", -U @ v)
    refuse(U @ U.T @ inner + inner, "the small matrix is UUᵀ + λI, not UUᵀ + I", U @ v)
    error = float((back - v).norm() / v.norm())
    require(error < 1e-6, f"(UᵀU + λI) x must give v back: the relative error is {error:.0e}")
    wide, long = draw.normal(2, 400_000), draw.normal(400_000)
    with hint("alloc", "400,000 × 400,000 numbers were asked for: form no matrix but the n × n matrix UUᵀ"):
        value = tensor(answer(wide, lam, long), 400_000)
    back = wide.T @ (wide @ value) + lam * value
    require(close(back, long, 1e-4), "right for 30 parameters, wrong for 400,000: is a size in the code?", earned=4)


def auroc(answer: Answer, draw: Draw) -> None:
    """All pairs of a poisoned and a clean chat."""
    poisoned = torch.arange(60) % 5 == 0
    ties = torch.randint(0, 5, (60,), generator=draw).double() + poisoned
    plain = ties + 0.01 * torch.randperm(60, generator=draw)
    gaps, level = (scores[poisoned][:, None] - scores[~poisoned] for scores in (plain, ties))
    value, above = number(answer(plain, poisoned)), (gaps > 0).double().mean()
    refuse(value, "poison on top gives 0: the score is suspicion, and a high one accuses", 1 - above)
    top = poisoned[plain.topk(12).indices].double().mean()
    require(not close(value, top) or close(top, above), "that is the share of poison among the 12 most suspicious")
    require(close(number(answer(plain**3, poisoned)), value), "cubing the scores changed it: only the order counts")
    require(close(value, above), "it is the share of pairs (poisoned, clean) in which the poisoned chat scores higher")
    tied, halves = number(answer(ties, poisoned)), (level.sign() + 1) / 2
    require(close(tied, halves.mean()), "tied pairs know nothing: they count one half", earned=1)


def datamodeling_score(answer: Answer, draw: Draw) -> None:
    """Exact influences score 1, whatever the losses' unit; a case with one swap is known by hand."""
    influences = draw.normal(3, 20) + 0.5
    subsets = [torch.randperm(20, generator=draw)[: draw.integer(5, 15)].tolist() for _ in range(40)]
    equal = [rows[:5] for rows in subsets]
    sums, level = (torch.stack([influences[:, rows].sum(1) for rows in some], dim=1) for some in (subsets, equal))
    offsets = torch.tensor([[0.0], [50.0], [-90.0]])
    plain, *others = (number(answer(influences, subsets, losses)) for losses in (sums, sums + offsets, sums.exp()))
    require(plain > -0.9, "-1 for exact influences: sum over the chats in the subset, not over those left out")
    moved, warped = (not close(other, plain, 1e-4) for other in others)
    require(not moved, "a query's level changed the score: rank within each query, then average")
    require(not warped, "exp of the losses changed the score: only their order counts, take ranks")
    means = number(answer(influences, equal, level)) > 0.9999 > plain
    require(not means, "1 only where subsets are equally large: take sums over a subset, not means")
    require(plain > 0.9999, f"exact influences score 1, and you give {plain:.3f}")
    swapped = torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    ascending = torch.tensor([[0.0, 0.5, 1.0]] * 2, dtype=torch.float64)
    half = number(answer(ascending, [[0], [1], [2]], swapped))
    require(close(half, 0.75), f"ranks 1 2 3 and 1 3 2 correlate by one half: with 1, 0.75 on average, not {half:.2f}")
