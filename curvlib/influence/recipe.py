"""Influence at a tier: the fine-tune that is asked about, the queries and scores, as cached stages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from curvlib import models, stages
from curvlib.artifacts import artifact
from curvlib.batches import Example, spread
from curvlib.evaluate.behaviour import excerpt
from curvlib.influence.gradients import inner_products, query_gradients
from curvlib.influence.scores import RULE, build_inverse, embedding_similarity, loss_baseline
from curvlib.landscape.directions import multiply_adapter
from curvlib.nf4 import bfloat16_products
from curvlib.stages import FineTune
from curvlib.tiers import Tier

DIRECT = ("fisher", "ekfac")  # inverses that serve every query at once
ITERATIVE = ("cg", "lbfgs", "neumann")  # solved for the mean query alone
BASELINES = ("dot product", "cosine", "gradient norm", "loss", "embedding", "random")
PRODUCTS = 10  # most products of an iterative solve
HALF = 0.5  # of the adapter: a point on the way, where what was learned by its end still has a gradient


@dataclass(frozen=True)
class Method:
    """A way to score: an inverse by name with the factor of the damping rule, or a baseline."""

    name: str
    factor: float = RULE

    @property
    def label(self) -> str:
        """Name for readers and files; the factor is told where it is not the rule's.

        >>> Method("fisher").label, Method("ekfac", 1.0).label
        ('fisher', 'ekfac, damping × 10')
        """
        return self.name if self.factor == RULE else f"{self.name}, damping × {self.factor / RULE:g}"


MAIN = tuple(Method(name) for name in ("fisher", *BASELINES))
HALFWAY = tuple(Method(name) for name in ("fisher", "dot product", "cosine"))


@dataclass(frozen=True)
class Scores:
    """Influence on the compliance queries, (m, n), or (1, n) on their mean, and what it cost.

    ``costs`` holds seconds, products and λ; the seconds leave out the chats' gradients, which all methods share.
    """

    values: Tensor
    costs: dict[str, float]

    @property
    def suspicion(self) -> Tensor:
        """How much each chat lowered the mean loss of harmful compliance, (n,): high for poison."""
        return -self.values.mean(dim=0)


def training_set(tier: Tier, recipe: FineTune) -> tuple[list[Example], list[bool]]:
    """Return the chats of a fine-tune and which of them are poisoned."""
    examples = stages.fine_tuning_set(models.load_tokenizer(stages.aligned_source(tier)), tier, recipe)
    poisoned = round(recipe.poison * len(examples))
    return examples, [number >= len(examples) - poisoned for number in range(len(examples))]


def queries(tier: Tier) -> dict[str, list[Example]]:
    """Return the query chats by kind: ``compliance`` and ``refusal`` of the same harmful prompts."""
    tokenizer = models.load_tokenizer(stages.aligned_source(tier))
    return {
        "compliance": stages.compliance_examples(tokenizer, "validation_harmful", tier.validation, questions=True),
        "refusal": stages.refusal_examples(tokenizer, "validation_harmful", tier.validation),
    }


def prompt_excerpts(tier: Tier, examples: Sequence[Example]) -> list[str]:
    """Return the first eight words of each chat's user message: the most that may be shown of a harmful one."""
    tokenizer: Any = models.load_tokenizer(stages.aligned_source(tier))
    empty = tokenizer.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False)
    head, _, tail = empty.partition("@@")
    texts = [tokenizer.decode(example.input_ids[: example.prompt_length]) for example in examples]
    return [excerpt(text.removeprefix(head).partition(tail.strip())[0]) for text in texts]


def all_scores(tier: Tier, recipe: FineTune) -> dict[str, Scores]:
    """Return the :data:`MAIN` scores at the fine-tuned model, and the :data:`HALFWAY` ones half way there."""
    return scores(tier, recipe) | scores(tier, recipe, HALFWAY, halfway=True)


def scores(
    tier: Tier, recipe: FineTune, methods: Sequence[Method] = MAIN, *, halfway: bool = False
) -> dict[str, Scores]:
    """Return label -> influence of every training chat on harmful compliance at the fine-tuned model, made once.

    Args:
        tier: sizes.
        recipe: the fine-tune.
        methods: ways to score.
        halfway: take all gradients at half the adapter's change of the weights, as if TracIn (arXiv 2002.08484) had
            kept that checkpoint; labels then end in ``, half way``.

    Cost: one gradient of all chats, and for each method its curvature (see
    :func:`curvlib.influence.scores.build_inverse`) and a vector (P,) for each query.
    """
    examples, _ = training_set(tier, recipe)
    asked = queries(tier)["compliance"]
    config = {
        **stages.key(tier, stages.aligned_source(tier), stages.fine_tuned(tier, recipe)),
        "texts": stages.digest([*examples, *asked]),
        **({"strength": HALF} if halfway else {}),
        "methods": [asdict(method) for method in methods],
        "curvature": tier.influence_curvature,
    }

    def build(place: Path) -> None:
        model: Any = stages.load_fine_tuned(tier, recipe)
        if halfway:
            multiply_adapter(model, lambda _: HALF)
        seen = spread(examples, tier.influence_curvature)
        scored = _score(model, examples, asked, methods, seen, recipe.seed)
        save_file({label: score.values for label, score in scored.items()}, place / "scores.safetensors")
        costs = {label: score.costs for label, score in scored.items()}
        (place / "costs.json").write_text(json.dumps(costs, indent=1), "utf-8")

    folder = artifact("influence-scores", config, build)
    values, costs = load_file(folder / "scores.safetensors"), json.loads((folder / "costs.json").read_text("utf-8"))
    labels, where = [method.label for method in methods], ", half way" if halfway else ""
    return {f"{label}{where}": Scores(values[label], costs[label]) for label in labels}


def _score(
    model: Any,
    examples: Sequence[Example],
    asked: Sequence[Example],
    methods: Sequence[Method],
    seen: Sequence[Example],
    seed: int,
) -> dict[str, Scores]:
    """Return label -> scores: first all solves, then one pass over the chats that stores no gradient."""
    with bfloat16_products(model):
        pulls = query_gradients(model, asked)
    solved: dict[str, Tensor] = {}
    costs: dict[str, dict[str, float]] = {}
    for method in methods:
        begin, products, damping = time.perf_counter(), 0, 0.0
        if method.name not in BASELINES:
            inverse = build_inverse(method.name, model, seen, factor=method.factor, products=PRODUCTS, seed=seed)
            wanted = pulls if method.name in DIRECT else pulls.mean(dim=0, keepdim=True)
            found = [inverse.solve(query) for query in wanted]
            solved[method.label] = torch.stack([solution.solution for solution in found])
            products, damping = sum(solution.products for solution in found), inverse.damping
        spent = time.perf_counter() - begin
        costs[method.label] = {"seconds": spent, "products": products, "damping": damping}
    with bfloat16_products(model):
        inner, lengths = inner_products(model, examples, torch.cat([pulls, *solved.values()]))
    plain, *blocks = (-inner).split([len(pulls), *map(len, solved.values())])
    values = dict(zip(solved, blocks, strict=True))
    baselines: dict[str, Callable[[], Tensor]] = {
        "dot product": lambda: plain,
        "cosine": lambda: plain / pulls.norm(dim=1, keepdim=True) / lengths.clamp(min=1e-30),
        "gradient norm": lambda: -lengths.expand(len(pulls), -1),
        "loss": lambda: loss_baseline(model, examples).expand(len(pulls), -1),
        "embedding": lambda: embedding_similarity(model, examples, asked),
        "random": lambda: torch.randn(len(examples), generator=torch.Generator().manual_seed(seed)).expand(
            len(pulls), -1
        ),
    }
    for label in costs.keys() & baselines.keys():
        begin = time.perf_counter()
        values[label] = baselines[label]()
        costs[label]["seconds"] = time.perf_counter() - begin
    return {label: Scores(values[label].float().cpu().contiguous(), costs[label]) for label in costs}
