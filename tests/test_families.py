"""Tiny models of many families: loss, gradient and answers are those of each chat alone, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlib import models, nf4, prefix
from curvlib.batches import IGNORED, Batch, Example, answer_logits, answer_targets, make_batches
from curvlib.curvature.forward import flat_gradient
from curvlib.curvature.ggn import ggn_vector_product
from curvlib.curvature.hessian import hessian_vector_product
from curvlib.generate import decode_batch, left_pad
from curvlib.parameters import trainable
from tests.cases import Exact, llama, random, relative_error

HEAD = tuple(range(5, 25))
ROWS = [[*HEAD, *tail] for tail in ((9, 10), (11, 12, 13, 14, 33, 44, 55, 66, 77, 88, 99), (9, 10, 15))]
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
HEADS, WINDOW = {"head_dim": 16}, {"sliding_window": 8}
FAMILIES = [
    *[(name, {}) for name in ("Llama", "Qwen2", "Phi3", "Phi", "SmolLM3", "Granite", "Olmo", "Olmo2", "Cohere")],
    *[(name, {}) for name in ("StableLm", "GPTNeoX", "OPT", "Falcon")],
    *[(name, WINDOW) for name in ("Mistral", "Phi3", "Starcoder2", "Olmo3", "Cohere2")],
    *[(name, HEADS) for name in ("Gemma", "Qwen3", "Gemma2", "Gemma3Text")],
    *[(name, HEADS | WINDOW) for name in ("Gemma2", "Gemma3Text")],
    ("Mistral", {"sliding_window": None}),
    ("Starcoder2", {"sliding_window": None}),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1} | WINDOW),
    ("Exaone4", {"sliding_window_pattern": 2} | WINDOW),
    ("GPT2", {"n_inner": 96}),
    ("GPTJ", {"rotary_dim": 8}),
    ("Falcon", {"alibi": True}),
    ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}),
    ("Mixtral", {"num_local_experts": 4}),
    ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} | HEADS),
]
FOUR_BITS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3", "SmolLM3", "Granite", "Olmo2"]
FOUR_BITS += ["Cohere", "StableLm", "GPTNeoX", "GPT2", "Mixtral"]


def model_of(name: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**(SIZES | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_config(config, **options).double()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.train(False)
    return model


def batch() -> Batch:
    return make_batches([Example(tuple(row), (*[IGNORED] * (len(row) - 2), *row[-2:])) for row in ROWS], 3, pad_id=0)[0]


def losses(model: Any) -> tuple[Tensor, Tensor]:
    """The batch's loss, and the same from each chat alone, without padding or cache."""
    given = batch()
    alone = Tensor.new_zeros(given.labels, (), dtype=torch.float64)
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -3:-1]
        alone = alone + cross_entropy(logits, torch.tensor(row[-2:]), reduction="sum") / given.tokens
    return cross_entropy(answer_logits(model, given), answer_targets(given)), alone


def answer(model: Any, row: list[int], tokens: int) -> list[int]:
    ids = list(row)
    for _ in range(tokens):
        chosen = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if chosen == 1:
            break
        ids.append(chosen)
    return ids[len(row) :]


@pytest.mark.parametrize(("name", "settings"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_batch_is_its_chats(name: str, settings: dict[str, Any]) -> None:
    model = model_of(name, settings)
    with Exact():
        together, alone = losses(model)
        parameters = list(trainable(model).values())
        assert relative_error(flat_gradient(together, parameters), flat_gradient(alone, parameters)) < 1e-10
        with torch.no_grad():
            written = decode_batch(model, *left_pad(ROWS, 0, torch.device("cpu")), [1], 4)
            assert written == [answer(model, row, 4) for row in ROWS]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_four_bit_models_have_the_derivatives_of_their_dense_twins(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path / "cache"))
    model_of(name, dict(FAMILIES)[name]).float().save_pretrained(tmp_path / "base")
    model = models.load_model(str(tmp_path / "base"), device="cpu")
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    with torch.no_grad():
        for label, layer in nf4.four_bit_layers(model).items():
            target = twin.get_submodule(label)
            target.weight.copy_(nf4.dequantise(layer) if isinstance(target, nn.Linear) else nf4.dequantise(layer).T)
    targets = [label.rpartition(".")[2] for label in nf4.four_bit_layers(model)]
    pairs = []
    for number, given in enumerate((model, twin)):
        adapted = models.add_lora(given, rank=2, seed=0, target_modules=sorted(set(targets)))
        adapted = (adapted.double() if number else adapted).eval()
        for label, parameter in adapted.named_parameters():
            if "lora_B" in label:
                parameter.data.copy_(0.05 * random(*parameter.shape))
        pairs.append((adapted, list(trainable(adapted).values())))
    (model, own), (twin, exact) = pairs
    v = random(sum(parameter.numel() for parameter in own))
    found = hessian_vector_product(lambda: losses(model)[0], own, v.float())
    products = ggn_vector_product(lambda: answer_logits(model, batch()), own, v.float())
    with Exact():
        assert relative_error(found, hessian_vector_product(lambda: losses(twin)[1], exact, v)) < 1e-4
        assert relative_error(products, ggn_vector_product(lambda: answer_logits(twin, batch()), exact, v)) < 1e-4


def test_the_check_would_see_a_shared_beginning_where_places_are_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "shares_beginnings", lambda _: True)
    together, alone = losses(model_of("Mpt", dict(FAMILIES)["Mpt"]))
    assert abs(float((together - alone).detach())) > 1e-4


@pytest.mark.filterwarnings("ignore")
def test_checkpointed_training_has_the_gradient_and_the_products_of_plain_training() -> None:
    results = []
    for checkpointed in (False, True):
        model: Any = llama()  # checkpointed layers run again where Exact is not in force
        assert prefix.shares_beginnings(model)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            assert not prefix.shares_beginnings(model)
        parameters = list(trainable(model).values())
        v = random(sum(parameter.numel() for parameter in parameters), dtype=torch.float32)
        slope = flat_gradient(losses(model)[0], parameters)
        results.append((slope, hessian_vector_product(lambda model=model: losses(model)[0], parameters, v)))
    assert all(relative_error(one, other) < 1e-4 for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "GPT2", "Cohere"])
def test_products_of_unusual_families_are_those_of_chats_alone(name: str) -> None:
    model = model_of(name, dict(next(settings for other, settings in FAMILIES if other == name)))
    parameters = [parameter for label, parameter in trainable(model).items() if "attn" in label and parameter.ndim > 1]
    v, given = random(sum(parameter.numel() for parameter in parameters)), batch()
    parts = [given.rows(number, number + 1) for number in range(3)]
    with Exact():
        found = ggn_vector_product(lambda: answer_logits(model, given), parameters, v)
        alone = sum(ggn_vector_product(lambda p=p: answer_logits(model, p), parameters, v) * p.tokens for p in parts)
    assert relative_error(found, alone / given.tokens) < 1e-10
