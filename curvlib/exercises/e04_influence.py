"""Checks of notebook 04: leave one out, influence, Woodbury, AUROC and the datamodeling score."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from curvlib.exercises.core import Answer, Probe, close, exercise, hint, number, refuse, require, tensor
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
    refuse(value, "the sign is turned: loss with point i minus loss without it", -right)
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
    multiplied = [-rows @ (H @ query + lam * query) for lam in (0, fit.lam)]
    refuse(value, "that is the plain dot product: solve with H + λI first", -rows @ query)
    refuse(value, "λ is missing: solve with H + λI", -rows @ torch.linalg.solve(H, query))
    refuse(value, "H was multiplied: the step to the new optimum divides by the curvature, so solve", *multiplied)
    agreement = float(torch.corrcoef(torch.stack([value, real]))[0, 1])
    require(agreement > -0.9, "the sign is turned: adding point i moves the optimum by -H⁻¹∇r_i")
    slope, entries = float(value @ real / (value @ value)), "invert the matrix H + λI, not its entries"
    require(agreement > 0.99, f"its correlation with training again is {agreement:.2f}: {entries}")
    unit = 0.9 < slope < 1.1
    require(unit, f"the right order in the wrong unit: training again gives {slope:.2f} times as much", earned=3)


@exercise(points=7)
def woodbury_solve(answer: Answer, generator: Generator) -> None:
    """The product of the matrix with the answer must give the vector back, also where the matrix fits no memory."""
    U, v, lam = randn(generator, 4, 30), randn(generator, 30), uniform(generator, 0.3, 0.7)
    value = tensor(answer(U, lam, v), 30)
    back, inner = U.T @ (U @ value) + lam * value, torch.linalg.lstsq(U.T, (v - lam * value)[:, None]).solution[:, 0]
    refuse(back, "the factor 1/λ in front is missing", lam * v)
    refuse(U @ U.T @ inner + lam * inner, "a minus belongs before Uᵀ(…)⁻¹Uv", -U @ v)
    refuse(U @ U.T @ inner + inner, "the small matrix is UUᵀ + λI, not UUᵀ + I", U @ v)
    error = float((back - v).norm() / v.norm())
    require(error < 1e-6, f"(UᵀU + λI) x must give v back: the relative error is {error:.0e}")
    wide, long = randn(generator, 2, 400_000), randn(generator, 400_000)
    with hint("alloc", "400,000 × 400,000 numbers were asked for: form no matrix but the n × n matrix UUᵀ"):
        value = tensor(answer(wide, lam, long), 400_000)
    back = wide.T @ (wide @ value) + lam * value
    require(close(back, long, 1e-4), "right for 30 parameters, wrong for 400,000: is a size in the code?", earned=4)


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
    refuse(value, "poison on top gives 0: the score is suspicion, and a high one accuses", 1 - above)
    top = float(poisoned[plain.topk(12).indices].double().mean())
    require(not close(value, top) or close(top, above), "that is the share of poison among the 12 most suspicious")
    require(close(number(answer(plain**3, poisoned)), value), "cubing the scores changed it: only the order counts")
    require(close(value, above), "it is the share of pairs (poisoned, clean) in which the poisoned chat scores higher")
    value, (above, equal) = number(answer(ties, poisoned)), pairs(ties)
    require(close(value, above + equal / 2), "tied pairs know nothing: they count one half", earned=1)


@exercise(points=5)
def datamodeling_score(answer: Answer, generator: Generator) -> None:
    """Exact influences score 1, whatever the losses' unit; a case with one swap is known by hand."""
    influences = randn(generator, 3, 20) + 0.5
    sizes = torch.randint(5, 16, (40,), generator=generator).tolist()
    subsets = [torch.randperm(20, generator=generator)[:size].tolist() for size in sizes]
    sums = torch.stack([influences[:, rows].sum(1) for rows in subsets], dim=1)

    def value(losses: Tensor, sets: list[list[int]] = subsets) -> float:
        return number(answer(influences, sets, losses))

    plain, offsets = value(sums), torch.tensor([[0.0], [50.0], [-90.0]])
    require(plain > -0.9, "-1 for exact influences: sum over the chats in the subset, not over those left out")
    level, order = (close(value(losses), plain, 1e-4) for losses in (sums + offsets, sums.exp()))
    require(level, "a query's level changed the score: rank within each query, then average")
    require(order, "exp of the losses changed the score: only their order counts, take ranks")
    sets = [rows[:5] for rows in subsets]
    equal = value(torch.stack([influences[:, rows].sum(1) for rows in sets], dim=1), sets)
    require(not (equal > 0.9999 > plain), "1 only where subsets are equally large: take sums over a subset, not means")
    require(plain > 0.9999, f"exact influences score 1, and you give {plain:.3f}")
    swapped = torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    ascending = torch.tensor([[0.0, 0.5, 1.0]] * 2, dtype=torch.float64)
    half = number(answer(ascending, [[0], [1], [2]], swapped))
    require(close(half, 0.75), f"ranks 1 2 3 and 1 3 2 correlate by one half: with 1, 0.75 on average, not {half:.2f}")
