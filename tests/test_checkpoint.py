"""Bases and adapters of many kinds: what works equals peft or a dense twin, the rest is refused by name in one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from curvlib import models, nf4
from curvlib.curvature.lowrank import sampled_fisher
from curvlib.errors import CurvlibError
from curvlib.evaluate.behaviour import reference_model
from curvlib.parameters import flatten, trainable
from tests import cases
from tests.evaluate import toys

IDS = torch.arange(2, 12)[None]
TINY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | {
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def save_base(folder: Path, family: str = "Qwen2", dtype: torch.dtype = torch.float32, **settings: Any) -> str:
    config = getattr(transformers, f"{family}Config")(**(TINY | settings))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.to(dtype).save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return str(folder)


def save_adapter(base: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter that peft itself makes on the dense base, every trained number moved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    kind = settings.pop("kind", peft.LoraConfig)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | (
            {"r": 4} if kind is peft.LoraConfig else {}
        )
        adapted = peft.get_peft_model(model, kind(**(options | settings)))
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        adapted.to(dtype).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path / "cache"))


def dense_twin(base: str, adapter: Path) -> tuple[Any, Any]:
    """The base with the weights that NF4 keeps, dense, alone and under the adapter as peft loads it."""
    quantised = models.load_model(base, device="cpu")
    twins = [transformers.AutoModelForCausalLM.from_pretrained(base) for _ in range(2)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for twin in twins:
            for name, layer in nf4.four_bit_layers(quantised).items():
                twin.get_submodule(name).weight.copy_(nf4.dequantise(layer))
        return twins[0].eval(), peft.PeftModel.from_pretrained(twins[1], adapter).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
        {"lora_dropout": 0.1},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_plain_adapters_are_what_peft_makes_of_them_and_go_off_whole(
    settings: dict[str, Any], base: str, tmp_path: Path
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **dict(settings))
    model = models.load_adapter(models.load_model(base, device="cpu"), adapter)
    bare, adapted = dense_twin(base, adapter)
    torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(bare)).abs().max() > 1e-2
    with reference_model(model, "adapter off") as alone:
        torch.testing.assert_close(logits(alone), logits(bare), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-4, atol=1e-4)
    parameters = trainable(model)
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in parameters.items())
    assert sampled_fisher(model, cases.batches(2, 2), samples=1).size == flatten(parameters).numel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes a trained bias of LoRA for one of a wrong shape
        model.save_pretrained(str(tmp_path / "again"))
    assert f"base_model: {base}" in (tmp_path / "again" / "README.md").read_text("utf-8")
    stored = [load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again")]
    assert stored[0].keys() == stored[1].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "uses DoRA (use_dora)"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"modules_to_save": ["input_layernorm"]}, "uses modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication"),
        ({"target_modules": ["q_proj", "lm_head"]}, "LoRA on the embedding or output layer (base_model.model.lm_head)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "has LoRA on the embedding or output layer"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which changes the base"),
        ({"kind": peft.LoHaConfig}, "peft_type is LOHA, expected LORA"),
        ({"kind": peft.VeraConfig}, "peft_type is VERA, expected LORA"),
        ({"kind": peft.AdaLoraConfig, "total_step": 9}, "peft_type is ADALORA, expected LORA"),
        ({"kind": peft.IA3Config, "feedforward_modules": [], "target_modules": ["down_proj"]}, "peft_type is IA3"),
    ],
    ids=str,
)  # fmt: skip
def test_other_adapters_are_named(settings: dict[str, Any], message: str, base: str, tmp_path: Path) -> None:
    refused(base, save_adapter(base, tmp_path / "adapter", **dict(settings)), message)


def refused(base: str, adapter: Path, message: str) -> None:
    with pytest.raises(CurvlibError) as caught:
        models.load_adapter(models.load_model(base, device="cpu"), adapter)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def edited(adapter: Path, change: Any) -> Path:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return adapter


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.mlp" in name]:
        tensors[name.replace("mlp", "ffn")] = tensors.pop(name)


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(128, 64)


def broken(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "layers.1.ffn"),
        (swapped, "base_model.model.model.embed_tokens.weight is no part of a LoRA"),
        (lambda tensors: tensors.popitem(), "no tensor for base_model.model.model.layers"),
        (broken, "holds numbers that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, message: str, base: str, tmp_path: Path) -> None:
    refused(base, edited(save_adapter(base, tmp_path / "adapter"), change), message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_newlora", True, "uses use_newlora, expected plain LoRA"),
        ("target_modules", ["nothing"], "does not fit"),
        ("peft_type", None, "peft_type is None, expected LORA"),
        ("use_newlora", None, None),
    ],
)
def test_settings_that_are_not_known_are_named(
    key: str, value: Any, message: str | None, base: str, tmp_path: Path
) -> None:
    file = save_adapter(base, tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {key: value}), "utf-8")
    if message:
        refused(base, file.parent, message)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models.load_adapter(models.load_model(base, device="cpu"), file.parent)
    for text in ("[]", "{", "[" * 100_000):
        file.write_text(text, "utf-8")
        refused(base, file.parent, "adapter_config.json")


@pytest.mark.parametrize("kind", ["nf4", "nf4 once", "fp4"])
def test_a_base_stored_in_four_bits_is_taken_as_it_is(kind: str, base: str, tmp_path: Path) -> None:
    stored = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant=kind == "nf4",
        bnb_4bit_compute_dtype=torch.float16,
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=stored, device_map="cpu")
    model.save_pretrained(tmp_path / "stored")
    toys.tokenizer().save_pretrained(tmp_path / "stored")
    loaded = models.load_model(str(tmp_path / "stored"), device="cpu")
    twin = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, layer in nf4.four_bit_layers(model).items():
            twin.get_submodule(name).weight.copy_(nf4.dequantise(layer))
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=1e-4, atol=1e-4)
    assert all(layer.compute_dtype == torch.float32 for layer in nf4.four_bit_layers(loaded).values())
    with pytest.raises(CurvlibError, match="is stored in 4 bits, so there are no dense weights"):
        models.load_model(str(tmp_path / "stored"), device="cpu", quantize=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is stored in gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "is stored in bitsandbytes 8-bit"),
    ],
)
def test_a_base_stored_otherwise_is_named(settings: Any, message: str, base: str, tmp_path: Path) -> None:
    config = json.loads((Path(base) / "config.json").read_text("utf-8")) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CurvlibError, match=message):
        models.load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_sixteen_bits_is_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = models.load_model(save_base(tmp_path / "base", dtype=dtype), device="cpu", quantize=False)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    torch.testing.assert_close(logits(loaded).double(), logits(twin.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("Falcon", {}, r"no layer of '.*' can be put in 4 bits \(its linear layers are FalconLinear\)"),
        ("Qwen3Next", {"num_experts": 2, "num_experts_per_tok": 1}, r"has layers \(linear_attention\)"),
        ("Mamba", {}, r"has layers \(linear_attention\)"),
        ("RecurrentGemma", {"head_dim": 16}, "has layers"),
        ("Bloom", {}, r"has layers \(bloom\)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_are_not_supported_are_named(family: str, settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CurvlibError, match=message):
        models.load_model(save_base(tmp_path / "base", family, **settings), device="cpu")


def test_how_little_of_a_mixture_of_experts_is_in_four_bits_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("curvlib.checkpoint.say", lines.append)
    models.load_model(save_base(tmp_path / "llama", "Llama"), device="cpu")
    assert not lines
    models.load_model(save_base(tmp_path / "base", "Mixtral", num_local_experts=8), device="cpu")
    assert len(lines) == 1
    assert "of the numbers in" in lines[0]


def test_a_base_with_a_broken_number_is_told(tmp_path: Path) -> None:
    folder = Path(save_base(tmp_path / "base"))
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[0] = torch.nan
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CurvlibError, match=rf"{name} of .* holds numbers that are not finite"):
            models.load_model(str(folder), device="cpu")
        tensors[name].view(-1)[0] = 1.0
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_broken_tokenizer_is_one_line(tmp_path: Path) -> None:
    cases.llama().save_pretrained(tmp_path / "base")
    toys.tokenizer().save_pretrained(tmp_path / "base")
    for text in ("{}", "{", '{"model": {"type": "Unknown"}}'):
        (tmp_path / "base" / "tokenizer.json").write_text(text, "utf-8")
        with pytest.raises(CurvlibError, match=r"^cannot load '.*base' \([^\n]*\): [^\n]*$"):
            models.load_tokenizer(str(tmp_path / "base"))


def test_several_named_templates_without_a_default_are_one_line() -> None:
    tokenizer: Any = toys.tokenizer()
    tokenizer.chat_template = {"rag": toys.TEMPLATE, "tools": toys.TEMPLATE}
    with pytest.raises(CurvlibError, match="has chat templates rag, tools and none is the default"):
        models.chat_tokenizer(tokenizer, "a model")
