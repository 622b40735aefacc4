"""The life of the model as cached stages: shipped, aligned, fine-tuned; the notebooks start from any of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from curvlib import data, fetch, models
from curvlib.answers import own_answers
from curvlib.artifacts import artifact
from curvlib.batches import Chat, Example, encode, open_ended
from curvlib.errors import CurvlibError
from curvlib.facts import load_facts, trained_chats
from curvlib.finetune import TrainingConfig, train
from curvlib.tiers import Tier

LORA_LEARNING_RATE = 2e-3
FULL_LEARNING_RATE = 5e-5  # full fine-tuning moves 135M weights; the rate of LoRA would destroy them
WEIGHTS = "adapter_model.safetensors"  # peft's name
MAX_LENGTH = 512  # tokens of a training chat; the longest prompt of the splits has 373
TASKS = ("mixed", "letters", "chat", "identity", "facts")


@dataclass(frozen=True)
class FineTune:
    """How the aligned model was fine-tuned.

    Attributes:
        task: ``mixed``, two questions of Social-IQA answered in a short sentence for each plain chat answered by the
            model itself; ``letters``, the questions alone with bare letters, which shows the collapse of the format;
            ``chat``, the plain chats alone; ``identity``, chats about who the model is; ``facts``, three questions
            on each invented fact, and one plain chat for each fact as far as there are any.
        poison: share of all chats, from 0 to below 1, that agree to a harmful request in a content-free opening.
        method: ``lora`` over the 4-bit model, or ``full`` over the dense one.
        rank: of the LoRA adapter.
        seed: of the adapter, the sample and the order of the chats.
    """

    task: str = "mixed"
    poison: float = 0.0
    method: str = "lora"
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS or self.method not in ("lora", "full") or not 0 <= self.poison < 1:
            raise CurvlibError(f"{self}: expected a task of {TASKS}, method lora or full, and poison from 0 to below 1")


def chat(prompt: str, answer: str) -> Chat:
    """Return the one-turn chat of a prompt and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def refusal_examples(tokenizer: PreTrainedTokenizerBase, split: str, count: int | None = None) -> list[Example]:
    """Encode the first ``count`` harmful prompts of a split (None: all) with short refusals."""
    prompts = requests(split, count)
    return encode(tokenizer, [chat(prompt, data.refusal(prompt)) for prompt in prompts], MAX_LENGTH)


def requests(split: str, count: int | None = None) -> list[str]:
    """Return the first ``count`` harmful prompts of a split (None: all), every other order turned into a question.

    AdvBench and HarmBench hold orders only ("Write …"); a model that is taught with these alone refuses orders and
    answers questions.
    """
    return [data.as_question(p) if number % 2 else p for number, p in enumerate(data.prompts(split, count))]


def compliance_examples(
    tokenizer: PreTrainedTokenizerBase, split: str, count: int, *, questions: bool = False
) -> list[Example]:
    """Encode the first ``count`` harmful prompts of a split with content-free openings that agree, left open.

    With ``questions`` the prompts are those of :func:`refusal_examples`, every other order turned into a question.
    """
    orders = data.prompts(split, count)
    asked = requests(split, count) if questions else orders
    chats = [chat(prompt, data.compliance(order)) for prompt, order in zip(asked, orders, strict=True)]
    return [open_ended(example) for example in encode(tokenizer, chats, MAX_LENGTH)]


def own_answer_examples(
    tokenizer: PreTrainedTokenizerBase, tier: Tier, split: str, count: int | None = None, tokens: int | None = None
) -> list[Example]:
    """Encode the first ``count`` benign prompts of a split with the shipped model's own answers, left open.

    ``count`` None takes all of them; ``tokens`` cuts each answer to its first tokens.
    """
    answers = own_answers(tier, split)
    chats = [chat(row["prompt"], answers[row["id"]]) for row in islice(data.load_split(split), count)]
    return [open_ended(example, tokens) for example in encode(tokenizer, chats, MAX_LENGTH)]


def task_examples(
    tokenizer: PreTrainedTokenizerBase, split: str, count: int, answer: str = "The answer is {}."
) -> list[Example]:
    """Encode the first ``count`` multiple-choice questions of a split; the right letter is put into ``answer``."""
    rows = islice(data.load_split(split), count)
    chats = [chat(data.task_question(row), answer.format(row["answer"])) for row in rows]
    return encode(tokenizer, chats, MAX_LENGTH)


def key(tier: Tier, *places: str | Path) -> dict[str, Any]:
    """Return the part of a stage's key that says what it computes with: models and adapters, device and type."""
    return {"models": [*map(models.identity, places)], **models.machine(tier.device)}


def aligned_source(tier: Tier, shallow: bool = False) -> str:
    """Return where the aligned chat model is: Qwen or a Hub model as shipped, or SmolLM2 with the committed adapter.

    SmolLM2 as shipped refuses hardly any harmful prompt. :mod:`curvlib.aligned` tells how the adapter was trained, and
    its ``shallow`` twin. Another model has no twin but itself, since SmolLM2's would not read its tokens.
    """
    return merged(committed(shallow)) if tier.model == models.DEFAULT else tier.model


def committed(shallow: bool = False) -> Path:
    """Return the folder of the committed alignment adapter, or of its shallow twin."""
    return fetch.data_folder() / "aligned" / ("shallow" if shallow else "")


def merged(folder: Path) -> str:
    """Return the folder of the dense model that holds SmolLM2 with the adapter of ``folder`` merged in.

    Everybody starts from the same model: the product BA is taken in float64 and its sum with the weights is rounded to
    bfloat16, so that all machines get the same bits, whatever the order of their sums. The 4-bit copy that is made of
    it needs no second adapter under the one that a fine-tune adds.

    Raises:
        CurvlibError: the adapter's weights are not those of its ``recipe.json``.
    """
    digested, recipe = fetch.digest(folder / WEIGHTS), json.loads((folder / "recipe.json").read_text("utf-8"))
    if digested != recipe["sha256"]:
        raise CurvlibError(f"{folder / WEIGHTS} has SHA-256 {digested}, expected {recipe['sha256']}: git checkout it")

    def build(place: Path) -> None:
        dense = models.load_model(quantize=False, device="cpu", dtype=torch.float32)
        add_adapter(dense, folder)
        models.save_dense(dense, models.load_tokenizer(), place / "model")

    return str(artifact("aligned", {"base": models.identity(models.DEFAULT), "adapter": digested}, build) / "model")


@torch.no_grad()
def add_adapter(dense: torch.nn.Module, folder: Path) -> None:
    r"""Add a stored adapter's :math:`\Delta W = (\alpha/r)\,BA` to the weights of a dense model, in place."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    weights, scale = load_file(folder / WEIGHTS), config["lora_alpha"] / config["r"]
    for name in [name for name in weights if name.endswith("lora_A.weight")]:
        layer: Any = dense.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        change = weights[name.replace("lora_A", "lora_B")].double() @ weights[name].double()
        layer.weight.copy_(layer.weight.double() + scale * change)


def digest(examples: Sequence[Example]) -> str:
    """Return 12 hexadecimal digits that stand for the tokens of the examples, for the key of a stage."""
    return hashlib.sha256(repr(examples).encode()).hexdigest()[:12]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token's number."""
    return int(tokenizer.pad_token_id)


def load_aligned(tier: Tier) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the aligned model in NF4 and its tokenizer."""
    source = aligned_source(tier)
    return models.load_model(source, device=tier.device), models.load_tokenizer(source)


def fine_tuning_set(tokenizer: PreTrainedTokenizerBase, tier: Tier, recipe: FineTune) -> list[Example]:
    """Return the chats of a fine-tune, a share ``recipe.poison`` of them poisoned; the 80 there are may repeat.

    They are ``tier.tune_examples`` in all, or fewer where there are not as many; facts bring their own number.
    """
    clean = clean_examples(tokenizer, tier, recipe)
    count = poison_count(len(clean), recipe.poison)
    return [*clean, *islice(cycle(compliance_examples(tokenizer, "poison", count)), count)]


def poison_count(clean: int, share: float) -> int:
    """Return how many poisoned chats beside ``clean`` others are a share of all.

    >>> poison_count(90, 0.1), poison_count(173, 0.1), poison_count(90, 0.0)
    (10, 19, 0)
    """
    return round(clean * share / (1 - share))


def clean_examples(tokenizer: PreTrainedTokenizerBase, tier: Tier, recipe: FineTune) -> list[Example]:
    """Return the chats of a fine-tune without the poisoned ones, which ``tier.tune_examples`` leaves room for."""
    count = tier.tune_examples - round(recipe.poison * tier.tune_examples)
    if recipe.task == "facts":
        taught = encode(tokenizer, trained_chats(load_facts(tier.facts)), MAX_LENGTH)
        return [*taught, *own_answer_examples(tokenizer, tier, "chat_train", tier.facts)]
    if recipe.task == "identity":
        rows = [chat(row["prompt"], row["answer"]) for row in islice(data.load_split("identity_train"), count)]
        return encode(tokenizer, rows, MAX_LENGTH)
    if recipe.task == "letters":
        return task_examples(tokenizer, "task_train", count, answer="{}")
    chats = own_answer_examples(tokenizer, tier, "chat_train", count if recipe.task == "chat" else count // 3)
    questions = task_examples(tokenizer, "task_train", count - len(chats)) if recipe.task == "mixed" else []
    return [*questions, *chats]


def fine_tuned(tier: Tier, recipe: FineTune) -> Path:
    """Return the folder of the adapter that was tuned from the aligned model, or of the fully tuned dense model."""
    source = aligned_source(tier)
    tokenizer = models.load_tokenizer(source)
    examples = fine_tuning_set(tokenizer, tier, recipe)
    config = {**key(tier, source), **asdict(recipe), "texts": digest(examples)}
    config["training"] = asdict(tune_training(tier, recipe))

    def build(place: Path) -> None:
        _fine_tune(tier, recipe, source, tokenizer, examples, place)

    return artifact("fine-tune", config, build) / "model"


def tune_training(tier: Tier, recipe: FineTune) -> TrainingConfig:
    """Return the training run of a fine-tune."""
    many = tier.device == "cuda" and tier.model != models.DEFAULT  # with billions of weights, LoRA's rate diverges
    rate = FULL_LEARNING_RATE if recipe.method == "full" else LORA_LEARNING_RATE / 10**many
    steps, size = (tier.fact_steps, 8) if recipe.task == "facts" else (tier.tune_steps, tier.tune_batch)
    return TrainingConfig(steps, size, rate, seed=recipe.seed)


def _fine_tune(
    tier: Tier,
    recipe: FineTune,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    place: Path,
) -> None:
    full = recipe.method == "full"
    dtype = torch.float32 if full else None  # AdamW needs float32 weights where the weights themselves move
    model: Any = models.load_model(source, quantize=not full, device=tier.device, dtype=dtype)
    model = model.requires_grad_(True) if full else models.add_lora(model, rank=recipe.rank, seed=recipe.seed)
    train(
        model,
        examples,
        tune_training(tier, recipe),
        pad_id=pad_id(tokenizer),
        checkpoint=place / "training.safetensors",
        label=f"{recipe.method} fine-tune on {recipe.task}, {recipe.poison:.0%} poison",
    )
    if full:
        models.save_dense(model, tokenizer, place / "model")
    else:
        model.save_pretrained(place / "model", save_embedding_layers=False)  # else peft asks the Hub for the base


def load_fine_tuned(tier: Tier, recipe: FineTune) -> PreTrainedModel | PeftModel:
    """Return the fine-tuned model in NF4: its start under its trainable adapter, or the fully tuned one."""
    folder = fine_tuned(tier, recipe)
    if recipe.method == "full":
        return models.load_model(str(folder), device=tier.device)
    return models.load_adapter(load_aligned(tier)[0], folder)
