"""Influence at a tier: the fine-tune that is asked about, the queries and scores, as cached stages."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from curvlib import models, stages
from curvlib.artifacts import artifact
from curvlib.batches import Example, spread
from curvlib.curvature.inverse import Inverse
from curvlib.evaluate.behaviour import excerpt
from curvlib.influence.gradients import Gradients, example_gradients, query_gradients
from curvlib.influence.scores import (
    RULE,
    build_inverse,
    cosine,
    dot_product,
    embedding_similarity,
    gradient_norm,
    loss_baseline,
)
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
    r"""Influence on the compliance queries, (m, n), or (1, n) on their mean, and what it cost.

    ``costs`` holds seconds, products and λ; the seconds leave out the chats' gradients, which all methods share.
    ``direction`` is the mean query's :math:`(H + \lambda I)^{-1} \nabla f`, (P,), kept for the main inverse alone; so
    is ``others``: kind of query -> influence on the mean query of that kind, (n,), at the end of the fine-tune.
    """

    values: Tensor
    costs: dict[str, float]
    direction: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def suspicion(self) -> Tensor:
        """How much each chat lowered the mean loss of harmful compliance, (n,): high for poison."""
        return -self.values.mean(dim=0)


def training_set(tier: Tier, recipe: FineTune) -> tuple[list[Example], list[bool]]:
    """Return the chats of a fine-tune and which of them are poisoned."""
    examples = stages.fine_tuning_set(models.load_tokenizer(stages.aligned_source(tier)), tier, recipe)
    poisoned = round(recipe.poison * tier.tune_examples)
    return examples, [number >= len(examples) - poisoned for number in range(len(examples))]


def queries(tier: Tier) -> dict[str, list[Example]]:
    """Return the query chats by kind: ``compliance`` and ``refusal`` of the same harmful prompts, and ``task``."""
    tokenizer = models.load_tokenizer(stages.aligned_source(tier))
    return {
        "compliance": stages.compliance_examples(tokenizer, "validation_harmful", tier.validation, questions=True),
        "refusal": stages.refusal_examples(tokenizer, "validation_harmful", tier.validation),
        "task": stages.task_examples(tokenizer, "validation_task", tier.validation),
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

    Cost: one gradient of all chats, written to disk meanwhile, and for each method its curvature (see
    :func:`curvlib.influence.scores.build_inverse`).
    """
    examples, _ = training_set(tier, recipe)
    wanted = queries(tier) if MAIN[0] in methods and not halfway else {"compliance": queries(tier)["compliance"]}
    config = {
        **stages.key(tier, stages.aligned_source(tier), stages.fine_tuned(tier, recipe)),
        "texts": stages.digest([*examples, *chain(*wanted.values())]),
        **({"strength": HALF} if halfway else {}),
        "methods": [asdict(method) for method in methods],
        "curvature": tier.influence_curvature,
    }

    def build(place: Path) -> None:
        model: Any = stages.load_fine_tuned(tier, recipe)
        if halfway:
            multiply_adapter(model, lambda _: HALF)
        store = place / "gradients"
        store.mkdir(exist_ok=True)
        with bfloat16_products(model):
            rows = example_gradients(model, examples, folder=store)
            pulls = {kind: query_gradients(model, chats) for kind, chats in wanted.items()}
        seen = spread(examples, tier.influence_curvature)
        work = _Work(model, examples, wanted["compliance"], rows, pulls, seen, recipe.seed)
        found = {method.label: work.score(method) for method in methods}
        shutil.rmtree(store)  # a gigabyte at full size, and the scores are what is wanted
        tensors = {label: scored.values.contiguous() for label, scored in found.items()}
        kept = {f"{label}/direction": s.direction for label, s in found.items() if s.direction is not None}
        others = {f"{label}/{kind}": values for label, s in found.items() for kind, values in s.others.items()}
        save_file({**tensors, **kept, **others}, place / "scores.safetensors")
        costs = {label: scored.costs for label, scored in found.items()}
        (place / "costs.json").write_text(json.dumps(costs, indent=1), "utf-8")

    folder = artifact("influence-scores", config, build)
    values, costs = load_file(folder / "scores.safetensors"), json.loads((folder / "costs.json").read_text("utf-8"))
    labels, where = [method.label for method in methods], ", half way" if halfway else ""
    return {f"{label}{where}": _read(label, values, costs) for label in labels}


def _read(label: str, tensors: Mapping[str, Tensor], costs: Mapping[str, dict[str, float]]) -> Scores:
    own = {name.removeprefix(f"{label}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{label}/")}
    direction = own.pop("direction", None)
    return Scores(tensors[label], costs[label], direction, own)


@dataclass(frozen=True)
class _Work:
    """What every method is computed from."""

    model: Any
    examples: list[Example]
    asked: list[Example]
    rows: Gradients
    pulls: Mapping[str, Tensor]
    seen: list[Example]
    seed: int

    def score(self, method: Method) -> Scores:
        """Return one method's scores and its cost."""
        begin = time.perf_counter()
        products, damping, direction, others = 0, 0.0, None, dict[str, Tensor]()
        if method.name in BASELINES:
            values = self._baseline(method.name)
        else:
            inverse = build_inverse(
                method.name, self.model, self.seen, factor=method.factor, products=PRODUCTS, seed=self.seed
            )
            damping = inverse.damping
            wanted = self.pulls["compliance"]
            if method.name not in DIRECT:
                wanted = wanted.mean(dim=0, keepdim=True)
            found = [inverse.solve(query) for query in wanted]
            products = sum(solution.products for solution in found)
            solutions = torch.stack([solution.solution for solution in found])
            values = -self.rows.dot(solutions)
            if method == MAIN[0]:
                direction, others = solutions.mean(dim=0).cpu(), self._others(inverse)
        spent = {"seconds": time.perf_counter() - begin, "products": products, "damping": damping}
        return Scores(values.float().cpu(), spent, direction, others)

    def _others(self, inverse: Inverse) -> dict[str, Tensor]:
        """Return the influence of every chat on the mean query of each other kind."""
        means = {kind: pull.mean(dim=0) for kind, pull in self.pulls.items() if kind != "compliance"}
        return {
            kind: -self.rows.dot(inverse.solve(mean).solution[None])[0].float().cpu() for kind, mean in means.items()
        }

    def _baseline(self, name: str) -> Tensor:
        m, n = len(self.asked), len(self.examples)
        if name in ("dot product", "cosine"):
            return (dot_product if name == "dot product" else cosine)(self.rows, self.pulls["compliance"])
        if name == "embedding":
            return embedding_similarity(self.model, self.examples, self.asked)
        alike: dict[str, Callable[[], Tensor]] = {
            "gradient norm": lambda: gradient_norm(self.rows),
            "loss": lambda: loss_baseline(self.model, self.examples),
            "random": lambda: torch.randn(n, generator=torch.Generator().manual_seed(self.seed)),
        }
        return alike[name]().expand(m, -1)
