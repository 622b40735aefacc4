"""Checks of notebook 03: directions, bowls, slices, subspaces and a null that keeps smoothness."""

import torch
from torch import Tensor

from curvlib.exercises.core import Answer, Draw, Probe, close, number, refuse, require, tensor


def row_normalised(answer: Answer, draw: Draw) -> None:
    """Lengths and cosines of each row."""
    W, raw = draw.normal(2, 4, 6)
    W[0] *= 10
    value, longer = (tensor(answer(each, W), 4, 6) for each in (raw, 7 * raw))
    refuse(value.norm(dim=0), "each column has the length of W's column: rows are the outputs, dim=1", W.norm(dim=0))
    cosines = torch.nn.functional.cosine_similarity(value, raw, dim=1)
    require(close(cosines, torch.ones(4)), "the direction of a row has changed: one factor for each row, and positive")
    require(close(longer, value), "a longer draw gives a longer direction: divide by the length of the draw's row")
    whole = raw * W.norm() / raw.norm()
    refuse(value, "the whole matrix is as long as W, but each row must be as long as W's row", whole)
    require(close(value.norm(dim=1), W.norm(dim=1)), "each row must be as long as the same row of W")


def without_bowl(answer: Answer, draw: Draw) -> None:
    """What is left must be at right angles to 1, x, y, x², xy, y², and what went must be made of them."""
    points = 2 * torch.rand(60, 2, generator=draw, dtype=torch.float64) - 0.8
    x, y = points.T
    shapes = (torch.ones_like(x), x**2 + 3 * y**2, 2 * x - y, x * y)
    one, bowl, tilt, turned = (tensor(answer(points, values), 60) for values in shapes)
    fit = close(one, shapes[0]) and close(bowl, shapes[1])
    require(not fit, "a bowl comes back whole: you returned the fit, return what it leaves")
    require(one.norm() < 1e-8, "a constant must leave nothing: add a column of ones")
    require(bowl.norm() < 1e-8, "a bowl must leave nothing: add columns x² and y²")
    require(tilt.norm() < 1e-8, "a tilt must leave nothing: add columns x and y")
    require(turned.norm() < 1e-8, "a bowl that is turned must leave nothing: add a column x·y")
    ripple = torch.sin(draw.uniform(4, 6) * x) + draw.normal(60)
    value, columns = tensor(answer(points, ripple), 60), torch.stack([*shapes, x, x * x], dim=1)
    fitted = columns @ torch.linalg.lstsq(columns, (ripple - value)[:, None]).solution
    require(close(fitted[:, 0], ripple - value), "more than a quadratic was taken away: a ripple must stay")
    require((columns.T @ value).norm() < 1e-6, "what is left still holds some of the bowl: fit by least squares")


def hill(theta: Tensor, tilt: Tensor) -> float:
    """A loss read from the weights as they are."""
    return float(theta @ tilt + theta @ theta)


def slice_2d(answer: Answer, draw: Draw) -> None:
    """Every value on its own, and the weights bit for bit."""
    home, tilt, first, second = draw.normal(4, 3)
    theta, alphas, betas = home.clone(), [-1.0, 0.0, draw.uniform(1, 2)], [0.0, draw.uniform(1, 2)]
    surface, left = answer.run(Probe(hill, theta, tilt), theta, first, second, alphas, betas)
    require(torch.as_tensor(surface).shape != (2, 3), "the slice is transposed: alphas are rows, betas columns")
    value = tensor(surface, 3, 2)
    require(torch.equal(left[1], home), "the weights did not come back: copy the start into theta after the last point")
    right, swapped = (
        [[hill(home + a * one + b * other, tilt) for b in betas] for a in alphas]
        for one, other in ((first, second), (second, first))
    )
    require(close(value[1, 0], right[1][0]), "at (0, 0) the slice must be the loss at home: start each point at home")
    refuse(value, "the directions are swapped: alpha goes along the first, beta along the second", swapped)
    require(close(value, right), "the value at (alpha, beta) is the loss at home + alpha d1 + beta d2")


def subspace_overlap(answer: Answer, draw: Draw) -> None:
    """Two spaces whose three principal angles are known, since they were built from them."""
    axes, turn = torch.linalg.qr(draw.normal(20, 6)).Q, torch.linalg.qr(draw.normal(3, 3)).Q
    cosines = torch.tensor([draw.uniform(*bounds) for bounds in ((0.88, 0.98), (0.6, 0.8), (0.3, 0.5))]).double()
    U, mix = axes[:, :3], draw.normal(3, 3) + 2 * torch.eye(3)
    V = U * cosines + axes[:, 3:] * (1 - cosines**2).sqrt()
    require(close(number(answer(U, U)), 1.0), "a space overlaps with itself by 1: take the mean over its dimensions")
    require(close(number(answer(U, U @ turn)), 1.0), "a turned basis spans the same space: compare spaces, not columns")
    require(close(number(answer(U @ mix, U @ mix)), 1.0), "columns need not be orthonormal: take QR of both first")
    value, product = number(answer(U @ mix, V @ turn)), cosines.prod()
    refuse(value, "that is the mean cosine: square the singular values before the mean", cosines.mean())
    refuse(value, "that is a determinant, which one right angle makes zero: take the mean", product, product**2)
    require(close(value, cosines.square().mean()), "the overlap is the mean squared cosine of the principal angles")


def unrelated_null(answer: Answer, draw: Draw) -> None:
    """All pairs of two different windows, one by one."""
    count, line = draw.integer(4, 6), torch.linspace(-1, 1, 49, dtype=torch.float64)
    first = line**4 + 0.1 * draw.normal(count, 49)
    second = first + 0.02 * draw.normal(count, 49)
    value = torch.as_tensor(answer(first, second)).double().flatten()
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    right = torch.stack([torch.corrcoef(torch.stack([first[i], second[j]]))[0, 1] for i, j in pairs])
    require(len(value) != count**2, "pairs of one and the same direction are in: leave i = j out")
    require(len(value) != count, "those are the matched pairs: the null asks for unrelated ones")
    require(len(value) != len(pairs) // 2, "half of the pairs are missing: (i, j) differs from (j, i)")
    require(len(value) == len(pairs), f"returned {len(value)} correlations, expected {len(pairs)}: m (m - 1) pairs")
    smooth = value.mean() / right.mean()
    require(smooth > 0.5, "you shuffled pixels: windows share their smooth shape, and the null must keep it")
    require(close(value.sort().values, right.sort().values, 1e-5), "correlate first[i] with second[j] for all i ≠ j")
