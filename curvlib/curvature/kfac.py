r"""EK-FAC: a layer-wise Kronecker model of the curvature that can be inverted at once.

A linear map :math:`z_t = W a_t` at token t receives :math:`g_t`, the gradient of the summed negative log-likelihood
with respect to :math:`z_t`. One chat's gradient is :math:`G = \sum_t g_t a_t^\top`. With labels drawn from the model,
once for each of the N answer tokens, the mean loss has the generalised Gauss-Newton block

.. math::
    C = \tfrac1N \sum_\text{chats} \mathbb E[\operatorname{vec} G \operatorname{vec} G^\top]
      \approx S \otimes A, \qquad
    A = \tfrac1M \sum_t a_t a_t^\top, \quad S = \tfrac1N \sum_t g_t g_t^\top,

where t runs over the M positions that are no padding and that precede an answer token (K-FAC, Martens and Grosse, arXiv
1503.05671). EK-FAC keeps the eigenvectors :math:`U_A, U_S` and measures the eigenvalues anew (George et al., arXiv
1806.03884; for language models Grosse et al., arXiv 2308.03296):

.. math:: \Lambda = \tfrac1N \sum_\text{chats} (U_S^\top G\, U_A)^2 \ \text{(by element)}.

In expectation this is the diagonal of C in that basis, the best that any diagonal there can do in Frobenius norm.
Blocks between layers are taken as zero. The scale is that of :class:`curvlib.curvature.ggn.GGNOperator`: the mean over
all answer tokens of all batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlib.batches import IGNORED, Batch, answer_logits, answer_targets, at_least_float32
from curvlib.curvature.closed_form import fused
from curvlib.curvature.kronecker import EKFAC, ROUNDS, Basis, Block, eigenvectors, rotate
from curvlib.errors import CurvlibError
from curvlib.parameters import trainable

WHOLE = 2 * 2**30  # bytes of factors that are formed whole, as SmolLM2's are; those of a 7B model take 129 GB
Fisher = Literal["sampled", "empirical"]
Side = tuple[str, str]  # "in" for A or "out" for S, and the map's name
Factors = tuple[dict[Side, Tensor], dict[str, str]]
Visit = Callable[[str, Tensor, Tensor, Tensor], None]


def ekfac(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> EKFAC:
    r"""Fit EK-FAC to the mean answer-token loss of ``batches``, for every linear map with a trainable weight.

    Args:
        model: its trainable parameters are the weights of linear layers: LoRA's or its own.
        batches: chats whose answer tokens form the loss; read twice, in the same order.
        weights: a factor on the share of each batch in C.
        rank: eigenvectors kept of each factor, by subspace iteration; the rest gets its mean eigenvalue. None keeps
            all, at :math:`O(d^3)` for each factor. EK-FAC's eigenvalues are exact for any orthonormal basis.
        seed: of the labels and of the subspace iteration.

    Maps that read the same tensor (LoRA's of q, k and v) share one input factor. Cost: two gradients of all batches and
    the eigenvectors; memory: :math:`d^2` numbers a factor while it is fitted. Where all would take more than ``WHOLE``
    bytes and there is a ``rank``, none is formed: each round reads all batches again, which is five gradients in all.

    Raises:
        CurvlibError: a trainable parameter is not the weight of one linear map, or takes no part in the loss.
    """
    maps, shares = linear_maps(model), list(weights or [1.0] * len(batches))
    device = next(iter(maps.values())).weight.device
    labels, sketch = (torch.Generator(device).manual_seed(seed) for _ in range(2))
    count = partial(_factors, model, batches, shares, maps, labels)
    if rank and 4 * sum(map_.in_features**2 + map_.out_features**2 for map_ in maps.values()) > WHOLE:
        basis, owners = _sketched(count, labels, rank, sketch)
    else:
        factors, owners = count(lambda _, rows: rows)
        order = sorted(factors, key=lambda side: side[0])
        basis = {side: eigenvectors(factors.pop(side), rank, sketch) for side in order}  # frees each factor
    bases = {name: (basis["out", name], basis["in", owners[name]]) for name in maps}
    values = _eigenvalues(model, batches, shares, maps, bases, labels)
    places = flat_places(model)
    blocks = tuple(Block(name, places[id(map_.weight)], *bases[name], values[name]) for name, map_ in maps.items())
    size = sum(parameter.numel() for parameter in trainable(model).values())
    return EKFAC(size, blocks[0].values.dtype, device, blocks)


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """Return name -> linear layer for all layers with a trainable weight; refuse any other trainable parameter."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    maps = {name: layer for name, layer in linear.items() if layer.weight.requires_grad}
    covered = {id(layer.weight) for layer in maps.values()}
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for name, parameter in trainable(model).items():
        if id(parameter) not in covered or owners[id(parameter)] > 1:
            raise CurvlibError(f"{name} is trainable, expected the weight of one linear layer only: freeze it")
    return maps


def flat_places(model: nn.Module) -> dict[int, int]:
    """Return id -> start in the flat vector for every trainable parameter."""
    places, start = {}, 0
    for parameter in trainable(model).values():
        places[id(parameter)] = start
        start += parameter.numel()
    return places


def _factors(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Sequence[float],
    maps: dict[str, nn.Linear],
    labels: torch.Generator,
    times: Callable[[Side, Tensor], Tensor],
) -> Factors:
    r"""Return A by owner and S by map, and map -> owner of its A (the first map seen to read the same tensor).

    With rows R, :math:`A = R^\top R`; returned is :math:`R^\top` ``times(side, R)``.
    """
    factors: dict[Side, Tensor] = {}
    owners: dict[str, str] = {}
    positions: dict[str, int] = {}
    readers: dict[tuple[Any, ...], tuple[str, Tensor]] = {}  # holds the tensors, so that no address is used twice

    def visit(weight: float, name: str, a: Tensor, g: Tensor, counted: Tensor) -> None:
        owners.setdefault(name, readers.setdefault((a.data_ptr(), a.shape, a.stride()), (name, a))[0])
        if owners[name] == name:
            rows = at_least_float32(a)[counted]
            factors["in", name] = factors.get(("in", name), 0) + weight * (rows.mT @ times(("in", name), rows))
            positions[name] = positions.get(name, 0) + len(rows)
        rows = g[counted]
        factors["out", name] = factors.get(("out", name), 0) + weight * (rows.mT @ times(("out", name), rows))

    for batch, weight in zip(batches, weights, strict=True):
        visit_maps(model, batch, maps, partial(visit, weight), "sampled", labels)
        readers.clear()
    tokens = sum(batch.tokens for batch in batches)
    for (side, name), factor in factors.items():
        factor /= positions[name] if side == "in" else tokens
    return factors, owners


def _sketched(
    count: Callable[..., Factors], labels: torch.Generator, rank: int, sketch: torch.Generator
) -> tuple[dict[Side, Basis], dict[str, str]]:
    """Return the bases that :func:`eigenvectors` would, and the owners; each ``count`` reads all batches."""
    state, columns = labels.get_state(), dict[Side, Tensor]()

    def times(side: Side, rows: Tensor) -> Tensor:
        if side not in columns:
            columns[side] = torch.randn(rows.shape[1], rank, generator=sketch, device=rows.device, dtype=rows.dtype)
        return rows @ columns[side]

    for _ in range(ROUNDS):
        labels.set_state(state)
        for side, product in count(times)[0].items():
            columns[side] = torch.linalg.qr(product).Q
    labels.set_state(state)
    products, owners = count(times)
    turned = {side: torch.linalg.eigh(columns[side].mT @ product).eigenvectors for side, product in products.items()}
    return {side: Basis(columns[side] @ turned[side]) for side in products}, owners


def _eigenvalues(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Sequence[float],
    maps: dict[str, nn.Linear],
    bases: dict[str, tuple[Basis, Basis]],
    labels: torch.Generator,
) -> dict[str, Tensor]:
    """Return the mean squares of the chats' gradients in the given bases, pooled."""
    values: dict[str, Tensor] = {}

    def visit(weight: float, name: str, a: Tensor, g: Tensor, _: Tensor) -> None:
        left, right = bases[name]
        squares = weight * rotate(left, right, chat_products(a, g)).square().sum(dim=0)
        values[name] = values.get(name, 0) + left.pool(right.pool(squares).mT).mT

    for batch, weight in zip(batches, weights, strict=True):
        visit_maps(model, batch, maps, partial(visit, weight), "sampled", labels)
    tokens = sum(batch.tokens for batch in batches)
    return {name: value / tokens for name, value in values.items()}


def visit_maps(
    model: nn.Module,
    batch: Batch,
    maps: dict[str, nn.Linear],
    visit: Visit,
    fisher: Fisher,
    labels: torch.Generator,
    draws: int = 1,
) -> None:
    """Call ``visit(name, inputs, output gradients, counted)`` for each map; the loss is summed over answer tokens.

    Each of the ``draws`` of labels visits every map once; all share one forward pass. Of a map whose output is scaled,
    such as LoRA's B, the scale may be counted among its inputs instead: every product of both is the same.
    """
    seen: set[str] = set()
    tapped: set[str] = set()
    sources: list[Tensor] = []  # what the others depend on: asked for these alone, autograd forms no weight's gradient
    names = {layer: name for name, layer in maps.items()}
    counted = _reaches_answer(batch).to(labels.device)

    def tap(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        tapped.add(name)
        if output.requires_grad:
            if not args[0].requires_grad:
                sources.append(output)
            elif not sources:  # the embeddings are made to require a gradient: all maps depend on what the first reads
                sources.append(args[0])
            output.register_hook(partial(receive, name, args[0].detach()))

    def receive(name: str, a: Tensor, g: Tensor) -> None:
        if name in seen:
            raise CurvlibError(f"{name} runs twice in a pass, expected once: freeze it")
        if a.ndim != 3:
            shape = f"inputs of shape {tuple(a.shape)}, expected (chat, position, feature)"
            raise CurvlibError(f"{name} reads {shape}: freeze it; of OPT adapt the attention alone")
        seen.add(name)
        width = a.shape[1]  # the head reads only what predicts an answer token, all but the last position
        visit(name, a, at_least_float32(g), counted if width == counted.shape[1] else counted[:, -1 - width : -1])

    def watch(layer: nn.Linear, a: Tensor, g: Tensor) -> None:
        if layer in names:  # LoRA's other map may be frozen
            receive(names[layer], a, g)

    hooks = [layer.register_forward_hook(partial(tap, name)) for name, layer in maps.items()]
    try:
        with fused(model, watch):
            logits = answer_logits(model, batch, once=False)  # hooks see each map once, with all chats
        sources += [layer.weight for name, layer in maps.items() if name not in tapped]  # fused: they get no gradient
        for draw in range(draws):
            seen.clear()
            given, keep = _residual(logits, batch, fisher, labels), draw + 1 < draws
            torch.autograd.grad(logits, sources, given, allow_unused=True, retain_graph=keep)
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := maps.keys() - seen:
        raise CurvlibError(f"{min(unseen)} takes no part in the loss: freeze it for EK-FAC")


@torch.no_grad()
def _residual(logits: Tensor, batch: Batch, fisher: Fisher, labels: torch.Generator) -> Tensor:
    """Return the gradient of the summed loss with respect to the logits: probabilities minus one-hot labels."""
    p = at_least_float32(logits).softmax(dim=-1)
    given = answer_targets(batch).to(p.device)
    chosen = torch.multinomial(p, 1, generator=labels)[:, 0] if fisher == "sampled" else given
    p[torch.arange(len(p), device=p.device), chosen] -= 1
    return p.to(logits.dtype)


def _reaches_answer(batch: Batch) -> Tensor:
    """Return (B, T) bool: the position is no padding and some answer token comes after it."""
    answers = (batch.labels != IGNORED).long()
    later = answers.sum(dim=1, keepdim=True) - answers.cumsum(dim=1)
    return (later > 0) & (batch.attention_mask > 0)


def chat_products(a: Tensor, g: Tensor) -> Tensor:
    r"""Return each chat's :math:`\sum_t g_t a_t^\top` (B, out, in) from a (B, T, in) and g (B, T, out).

    g is zero where no answer can be reached. The narrow factor goes first: on a CPU up to five times as fast.
    """
    a = at_least_float32(a)
    return g.mT @ a if g.shape[-1] <= a.shape[-1] else (a.mT @ g).mT
