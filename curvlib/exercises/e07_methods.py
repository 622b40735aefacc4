"""Checks of notebook 07: an arc, a mask, a front, a projection, and what a claim over seeds is worth."""

import torch
from torch import Generator

from curvlib.exercises.core import Answer, Draw, close, refuse, require, tensor


def slerp(answer: Answer, draw: Draw) -> None:
    """Angles and lengths on the arc between two unit vectors."""
    (a, across), t = torch.linalg.qr(draw.normal(5, 2)).Q.T, draw.uniform(0.2, 0.4)
    omega = torch.tensor(draw.uniform(0.8, 1.4), dtype=torch.float64)
    b, place = (a * angle.cos() + across * angle.sin() for angle in (omega, t * omega))
    first, last, value = (tensor(answer(a, b, share), 5) for share in (0.0, 1.0, t))
    length, half = float(value.norm()), tensor(answer(a / 2, b / 2, t), 5)
    require(close(first, a) and close(last, b), "t = 0 must give the first vector and t = 1 the second")
    require(close(length, 1), f"on the arc the length stays 1, and yours is {length:.3f}: that is the straight line")
    require(close(value, place), "at t the angle from the first vector is t times the whole angle")
    require(close(half, value / 2), "half the lengths changed the angle: divide by both lengths")
    axis = torch.eye(5, dtype=torch.float64)[draw.integer(0, 4)]  # its cosine with itself is 1 to the last bit
    try:
        parallel = close(answer(axis, 2 * axis, 0.5), 1.5 * axis)
    except Exception:  # such as a division by zero
        parallel = False
    require(parallel, "parallel vectors have sin Ω = 0: take the straight line there", earned=2)


def dare(answer: Answer, draw: Draw) -> None:
    """The share of zeros, and each entry that is left."""
    p, delta, seed = draw.uniform(0.6, 0.9), draw.normal(20_000) + 5, draw.integer(0, 10**6)
    first, second = (tensor(answer(delta, p, Generator().manual_seed(seed + k)), 20_000) for k in (0, 1))
    left, zeros = first != 0, float((first == 0).double().mean())
    require(abs(zeros - p) < 0.03, f"p is the share that is DROPPED: {zeros:.0%} are zero, expected {p:.0%}")
    require(not torch.equal(first, second), "another generator drew the same mask: use the generator that is passed in")
    refuse(first[left], "the step shrank to 1 - p of it on average: rescale what is left", delta[left])
    refuse(first[left], "rescale by 1 / (1 - p), the share that is left, not by 1 / p", delta[left] / p)
    require(close(first[left], delta[left] / (1 - p)), "an entry that is left must be delta / (1 - p)")


def pareto_front(answer: Answer, draw: Draw) -> None:
    """Each point is compared with each other point; harm and over-refusal fall, the task's accuracy rises."""
    low, high = sorted(torch.randperm(50, generator=draw)[:2].tolist())
    cloud = torch.randint(0, 4, (12, 3), generator=draw)
    pairs = [[[low, low, low], [low, low, high]], [[low, low, low], [low, high, low]], [[low, low, high]] * 2]
    task, refusal, same, front = (sorted(int(index) for index in answer(points)) for points in (*pairs, cloud.tolist()))
    require(1 in task, "task accuracy: more is better")
    require(0 in refusal, "over-refusal: less is better")
    require(task == [1] and refusal == [0], "a point that loses on one axis and wins on none is off the front")
    require(same == [0, 1], "equal points do not dominate each other: somewhere the other must be better")
    axes = cloud * torch.tensor([1, 1, -1])
    for index, point in enumerate(axes):
        dominated = bool(((axes <= point).all(1) & (axes < point).any(1)).any())
        place = "on" if dominated else "off"
        require((index in front) != dominated, f"{cloud[index].tolist()} is {place} your front of {cloud.tolist()}")


def projected_update(answer: Answer, draw: Draw) -> None:
    """One layer, with thresholds on either side of its cosine."""
    V, update = draw.normal(6, 2) @ draw.normal(2, 5), draw.normal(6, 5)
    projected, right = torch.einsum("ik,jk,jl->il", V, V, update), torch.einsum("ij,kj,kl->il", update, V, V)
    cosine = float((update * projected).sum() / (update.norm() * projected.norm()))
    value, below, above = (tensor(answer(update, V, tau), 6, 5) for tau in (2.0, cosine + 0.05, cosine - 0.05))
    refuse(value, "divide V Vᵀ by the Frobenius norm of V", projected)
    refuse(value, "C is (out, out) and acts from the left: C = V Vᵀ / ‖V‖", right / V.norm())
    require(not close(value, update) and close(below, value), "below the threshold the layer is projected, not yours")
    require(close(value, projected / V.norm()), "below the threshold the update becomes C times the update")
    require(close(above, update), "above the threshold the layer stays as it is: yours is projected always")


def claim_status(answer: Answer, draw: Draw) -> None:
    """Every number of seeds that hold."""
    seeds = draw.integer(3, 5)
    holds, fails = ({"holds": flag, "value": 1.0, "control": 0.0} for flag in (True, False))
    none, one, *_, most, every = status = [answer([holds] * k + [fails] * (seeds - k)) for k in range(seeds + 1)]
    require(none == "fails", "it held at no seed, so it fails, whatever its values are")
    require(every == "holds", "it held at every seed, so it holds")
    require(one != "holds", "one seed that holds is not enough: what depends on the seed is open")
    require(most == "open", f"{seeds - 1} of {seeds} is no vote: what depends on the seed is open")
    require(set(status[1:-1]) == {"open"}, "what depends on the seed is open")
