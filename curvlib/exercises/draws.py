"""Small random cases, drawn from the generator of a seed, in float64."""

import torch
from torch import Generator, Tensor


def randn(generator: Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(generator: Generator, low: float, high: float) -> float:
    """One number between two bounds."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def positive(generator: Generator, size: int, ridge: float = 0.2) -> Tensor:
    """A symmetric positive definite matrix that lies along no axis."""
    root = randn(generator, size, size)
    return root @ root.T / size + ridge * torch.eye(size, dtype=torch.float64)


def integer(generator: Generator, low: int, high: int) -> int:
    """One integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
