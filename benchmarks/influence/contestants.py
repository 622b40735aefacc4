"""Who scores, and how: curvlib, kronfluence, bergson, dattri."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from benchmarks.influence.peers import bergson, dattri, kronfluence
from benchmarks.influence.work import Score, Work
from curvlib.batches import make_batches
from curvlib.curvature.inverse import fit
from curvlib.influence.gradients import BATCH_SIZE, influence
from curvlib.nf4 import bfloat16_products, four_bit_layers


@dataclass(frozen=True)
class Contestant:
    """One way to score; ``installed`` says whether 4-bit layers run on :mod:`curvlib.nf4`."""

    package: str
    method: str
    score: Score
    installed: bool = False

    @property
    def name(self) -> str:
        """Package and method: the key of a row."""
        return f"{self.package}: {self.method}"


def ours(method: str, model: nn.Module, work: Work) -> Tensor:
    """Score with curvlib: the inverse applied to each query, then one pass over the chats that stores no gradient."""
    curvature = fit(method, model, make_batches(work.seen, BATCH_SIZE, pad_id=0))
    with bfloat16_products(model):
        return influence(model, work.examples, work.queries, curvature.inverse(work.damping)).float().cpu()


PEERS: tuple[tuple[str, str, Score], ...] = (
    ("kronfluence", "ekfac", kronfluence),
    ("bergson", "ekfac", bergson),
    ("dattri", "datainf", partial(dattri, "datainf")),
    ("dattri", "ekfac", partial(dattri, "ekfac")),
)
OURS = tuple(Contestant("curvlib", method, partial(ours, method), installed=True) for method in ("fisher", "ekfac"))
OTHERS = tuple(Contestant(*peer) for peer in PEERS)
HELPED = tuple(Contestant(f"{package} on curvlib.nf4", method, score, True) for package, method, score in PEERS)


def contestants(four_bit: bool) -> tuple[Contestant, ...]:
    """Return all that can be tried; peers on curvlib's 4-bit layer only where there is one."""
    return OURS + OTHERS + (HELPED if four_bit else ())


def has_four_bit(model: nn.Module) -> bool:
    """Tell whether a model has 4-bit layers."""
    return bool(four_bit_layers(model))
