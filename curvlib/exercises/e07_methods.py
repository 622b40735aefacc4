"""Checks of notebook 07: an arc, a mask, a front, a projection, and what a claim over seeds is worth."""

import torch
from torch import Generator, Tensor

from curvlib.exercises.core import Answer, close, exercise, refuse, require, tensor
from curvlib.exercises.draws import integer, randn, uniform


@exercise(points=3)
def slerp(answer: Answer, generator: Generator) -> None:
    """Angles and lengths on the arc between two unit vectors."""
    basis, t = torch.linalg.qr(randn(generator, 5, 2)).Q, uniform(generator, 0.2, 0.4)
    omega = torch.tensor(uniform(generator, 0.8, 1.4), dtype=torch.float64)
    a, b = basis[:, 0], basis[:, 0] * omega.cos() + basis[:, 1] * omega.sin()

    def arc(first: Tensor, second: Tensor, share: float) -> Tensor:
        return tensor(answer(first, second, share), 5)

    ends, value = close(arc(a, b, 0.0), a) and close(arc(a, b, 1.0), b), arc(a, b, t)
    length = float(value.norm())
    require(ends, "t = 0 must give the first vector and t = 1 the second")
    require(close(length, 1), f"on the arc the length stays 1, and yours is {length:.3f}: that is the straight line")
    place = basis[:, 0] * (t * omega).cos() + basis[:, 1] * (t * omega).sin()
    require(close(value, place), "at t the angle from the first vector is t times the whole angle")
    require(close(arc(a / 2, b / 2, t), value / 2), "half the lengths changed the angle: divide by both lengths")
    axis = torch.eye(5, dtype=torch.float64)[integer(generator, 0, 4)]  # its cosine with itself is 1 to the last bit
    try:
        parallel = close(arc(axis, 2 * axis, 0.5), 1.5 * axis)
    except Exception:  # not finite, or a division by zero
        parallel = False
    require(parallel, "parallel vectors have sin Ω = 0: take the straight line there", earned=2)


@exercise(points=3)
def dare(answer: Answer, generator: Generator) -> None:
    """The share of zeros, and each entry that is left."""
    p, delta = uniform(generator, 0.6, 0.9), randn(generator, 20_000) + 5
    seed = integer(generator, 0, 10**6)
    first, second = (tensor(answer(delta, p, Generator().manual_seed(seed + k)), 20_000) for k in (0, 1))
    left = first != 0
    zeros = 1 - float(left.double().mean())
    require(abs(zeros - p) < 0.03, f"p is the share that is DROPPED: {zeros:.0%} are zero, expected {p:.0%}")
    require(not torch.equal(first, second), "another generator drew the same mask: use the generator that is passed in")
    refuse(first[left], "the step shrank to 1 - p of it on average: rescale what is left", delta[left])
    refuse(first[left], "rescale by 1 / (1 - p), the share that is left, not by 1 / p", delta[left] / p)
    require(close(first[left], delta[left] / (1 - p)), "an entry that is left must be delta / (1 - p)")


@exercise(points=5)
def pareto_front(answer: Answer, generator: Generator) -> None:
    """Each point is compared with each other point; harm and over-refusal fall, the task's accuracy rises."""
    low, high = sorted(torch.randperm(50, generator=generator)[:2].tolist())

    def front(points: list[list[int]]) -> list[int]:
        return sorted(int(index) for index in tensor(answer(points), len(answer(points))))

    task, refusal = front([[low, low, low], [low, low, high]]), front([[low, low, low], [low, high, low]])
    require(1 in task, "task accuracy: more is better")
    require(0 in refusal, "over-refusal: less is better")
    require(task == [1] and refusal == [0], "a point that loses on one axis and wins on none is off the front")
    same = front([[low, low, high]] * 2)
    require(same == [0, 1], "equal points do not dominate each other: somewhere the other must be better")
    cloud = torch.randint(0, 4, (12, 3), generator=generator)
    value, axes = front(cloud.tolist()), cloud * torch.tensor([1, 1, -1])
    for index, point in enumerate(axes):
        dominated = bool(((axes <= point).all(1) & (axes < point).any(1)).any())
        place = "on" if dominated else "off"
        require((index in value) != dominated, f"{cloud[index].tolist()} is {place} your front of {cloud.tolist()}")


@exercise(points=4)
def projected_update(answer: Answer, generator: Generator) -> None:
    """One layer, with thresholds on either side of its cosine."""
    V, update = randn(generator, 6, 2) @ randn(generator, 2, 5), randn(generator, 6, 5)
    projected = torch.einsum("ik,jk,jl->il", V, V, update) / V.norm()
    cosine = float((update * projected).sum() / (update.norm() * projected.norm()))
    value, below, kept = (tensor(answer(update, V, tau), 6, 5) for tau in (2.0, cosine + 0.05, cosine - 0.05))
    right = torch.einsum("ik,lk,lj->ij", update, V, V) / V.norm()
    refuse(value, "divide V Vᵀ by the Frobenius norm of V", projected * V.norm())
    refuse(value, "C is (out, out) and acts from the left: C = V Vᵀ / ‖V‖", right)
    require(not close(value, update) and close(below, value), "below the threshold the layer is projected, not yours")
    require(close(value, projected), "below the threshold the update becomes C times the update, C = V Vᵀ / ‖V‖")
    require(close(kept, update), "above the threshold the layer stays as it is: yours is projected always")


@exercise(points=2)
def claim_status(answer: Answer, generator: Generator) -> None:
    """Every number of seeds that hold."""
    count = integer(generator, 3, 5)

    def status(held: int) -> object:
        order = torch.randperm(count, generator=generator).tolist()
        return answer([{"holds": place < held, "value": 1.0, "control": 0.0} for place in order])

    require(status(0) == "fails", "it held at no seed, so it fails, whatever its values are")
    require(status(count) == "holds", "it held at every seed, so it holds")
    require(status(1) != "holds", "one seed that holds is not enough: what depends on the seed is open")
    require(status(count - 1) == "open", f"{count - 1} of {count} is no vote: what depends on the seed is open")
    require(all(status(held) == "open" for held in range(1, count)), "what depends on the seed is open")
