"""Models come from folders, the Hub or the package index, in NF4 or dense, and every failure is one line."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from curvlib import models, nf4
from curvlib.errors import CurvlibError
from tests import cases
from tests.evaluate import toys


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny dense chat model in bfloat16, and a cache of its own."""
    monkeypatch.setenv("CURVLIB_CACHE", str(tmp_path / "cache"))
    models.save_dense(cases.llama(), toys.tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(10)[None], use_cache=False).logits
    return result


def test_nf4_on_the_cpu_is_transformers_own_quantisation(checkpoint: Path) -> None:
    """Oracle: transformers quantises the same checkpoint at loading, without our cached copy."""
    model = models.load_model(str(checkpoint), device="cpu")
    direct = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=nf4.settings(torch.float32), dtype=torch.float32, device_map={"": "cpu"}
    )
    for layer in nf4.four_bit_layers(direct).values():
        layer.support_avx512bf16_for_cpu = False  # where the CPU can, bitsandbytes would multiply in bfloat16
    layers: list[Any] = list(nf4.four_bit_layers(model).values())
    assert len(layers) == 14
    assert all(layer.weight.quant_state.nested and layer.weight.quant_state.quant_type == "nf4" for layer in layers)
    expected = direct.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert all("forward" in vars(layer) for layer in layers)  # nf4.install was called
    assert torch.allclose(logits(model), logits(direct), atol=1e-4)


def test_the_quantised_copy_is_made_once_and_follows_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    first = models.load_model(str(checkpoint), device="cpu")
    (copy,) = (tmp_path / "cache" / "artifacts").glob("nf4-*")
    made = copy.stat().st_mtime_ns
    models.load_model(str(checkpoint), device="cpu")
    assert copy.stat().st_mtime_ns == made
    models.save_dense(cases.llama(seed=1), toys.tokenizer(), checkpoint)
    assert not torch.equal(logits(models.load_model(str(checkpoint), device="cpu")), logits(first))


def test_a_loaded_model_is_frozen_eager_and_in_evaluation_mode(checkpoint: Path) -> None:
    for quantize in (True, False):
        model = models.load_model(str(checkpoint), quantize=quantize, device="cpu")
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert model.config._attn_implementation == "eager"
        assert model.dtype == torch.float32


def test_save_dense_writes_bfloat16_leaves_the_model_and_replaces_whole(tmp_path: Path) -> None:
    model = cases.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = tmp_path / "model"
    for _ in range(2):
        models.save_dense(model, toys.tokenizer(), folder)
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, before[name].bfloat16()) for name, tensor in saved.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float32
    assert not [path for path in (tmp_path / ".tmp").iterdir() if path.is_dir()]


def test_lora_starts_as_the_same_function_and_is_drawn_from_its_seed(checkpoint: Path) -> None:
    def adapters(seed: int) -> tuple[Any, dict[str, torch.Tensor]]:
        model = models.add_lora(models.load_model(str(checkpoint), device="cpu"), rank=3, seed=seed)
        return model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    state = torch.random.get_rng_state()
    (model, first), (_, again), (_, other) = adapters(0), adapters(0), adapters(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(logits(model), logits(models.load_model(str(checkpoint), device="cpu")))
    assert len(first) == 28
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.scaling == {"default": 2.0}


def test_lora_is_float32_over_a_bfloat16_model(checkpoint: Path) -> None:
    base = models.load_model(str(checkpoint), quantize=False, device="cpu", dtype=torch.bfloat16)
    model = models.add_lora(base, rank=2, alpha=2, seed=0, target_modules=["q_proj"])
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert all("q_proj" in name for name in trained)


def test_a_saved_adapter_comes_back_trainable(checkpoint: Path, tmp_path: Path) -> None:
    model = models.add_lora(models.load_model(str(checkpoint), device="cpu"), rank=2, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = models.load_adapter(models.load_model(str(checkpoint), device="cpu"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}


def test_the_tokenizer_pads_on_the_left(checkpoint: Path) -> None:
    tokenizer = models.load_tokenizer(str(checkpoint))
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token


def test_a_model_without_a_chat_template_is_one_line(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(CurvlibError, match=r"^'.*' has no chat template, .*$"):
        models.load_tokenizer(str(checkpoint))


def test_a_folder_without_weights_is_one_line(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CurvlibError, match=r"^cannot load '.*' \(.*\): check its name.*$"):
        models.load_model(str(checkpoint), device="cpu")


@pytest.mark.parametrize("name", ["smollm", "no/such/model", "/tmp"])
def test_a_name_that_is_no_model_is_one_line(name: str) -> None:
    with pytest.raises(CurvlibError, match=r"^no model is called '.*': give 'smollm2', 'qwen', .*$"):
        models.load_model(name, device="cpu")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    for load in (models.load_model, models.load_tokenizer):
        with pytest.raises(CurvlibError, match=r"^cannot load 'no-one/no-model' \(.*\): check its name.*$"):
            load("no-one/no-model")


def test_a_hub_id_works_in_place_of_a_folder_and_brings_no_pickle(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str]] = {}

    def hub(name: str, **patterns: list[str]) -> str:
        assert name == "org/model"
        asked.update(patterns)
        return str(checkpoint)

    monkeypatch.setattr(models, "snapshot_download", hub)
    there, here = models.load_model("org/model", device="cpu"), models.load_model(str(checkpoint), device="cpu")
    assert torch.equal(logits(there), logits(here))
    for file in ("pytorch_model.bin", "original/consolidated.00.pth", "modeling.py", "model.pkl"):
        assert not any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.choose_device() == "cpu"
    with pytest.raises(CurvlibError, match=r"^device 'cuda' needs a GPU.*--tier cpu.*$"):
        models.load_model(device="cuda")
    with pytest.raises(CurvlibError, match="'tpu'"):
        models.load_model(device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert models.choose_device() == "cuda"


def test_models_on_a_gpu_are_float32_and_share_the_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    base, read = cases.llama().requires_grad_(False), list[tuple[Any, ...]]()
    cases.quantise(base)
    nf4.install(base)

    def from_disk(*arguments: Any) -> Any:
        read.append(arguments)
        return base

    monkeypatch.setattr(models, "choose_device", lambda _: "cuda")
    monkeypatch.setattr(models, "locate", lambda source: source)
    monkeypatch.setattr(models, "_read", from_disk)
    models._resident.cache_clear()
    first, second = models.load_model("a/b"), models.load_model("a/b")
    models.load_model("a/b", quantize=False)
    assert read == [("a/b", "a/b", True, "cuda", torch.float32), ("a/b", "a/b", False, "cuda", torch.bfloat16)]
    models._resident.cache_clear()
    before = logits(second)
    adapted = cases.add_lora(first)
    assert cases.relative_error(logits(adapted), before) > 0.01  # the adapter does something, on the first model alone
    assert torch.equal(logits(second), before)
    places = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in (adapted, second, base)]
    assert places[0] == places[1] == places[2]
    layers = [model.get_submodule("model.layers.0.mlp.up_proj") for model in (second, base)]
    assert layers[0] is not layers[1]
    assert layers[0].quant_state is layers[1].quant_state
    assert vars(layers[0])["forward"].__self__ is layers[0]  # a copy multiplies by its own layer


def test_smollm2_answers_in_its_own_template() -> None:
    tokenizer, model = models.load_tokenizer(), models.load_model(device="cpu")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.decode(ids["input_ids"][0])
    made: Any = model
    answer = made.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, Linear4bit)
    assert nf4.dequantise(layer).shape == (1536, 576)
