"""A base, an adapter and the tokenizer that the adapter was trained with, checked together when they are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from curvlib import models
from curvlib.batches import Example
from curvlib.checkpoint import adapter_settings
from curvlib.errors import CurvlibError
from curvlib.progress import say


def adapter_folder(adapter: Path) -> Path:
    """Return the adapter's folder; what is no folder here and looks like a Hub id is fetched.

    Raises:
        CurvlibError: the Hub has none of this name, or is out of reach.
    """
    fetched = not adapter.exists() and models.HUB_ID.fullmatch(adapter.as_posix())
    return Path(models.download(adapter.as_posix())) if fetched else adapter


def load_pair(base: str, adapter: Path, device: str | None, examples: Iterable[Example]) -> PeftModel:
    """Return the base in NF4 under the adapter, trainable; ``examples`` are all that it will read.

    Raises:
        CurvlibError: the adapter is of another base, or the base has no embedding for a token.
    """
    model = models.load_model(base, device=device)
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    highest = max(max(example.input_ids) for example in examples)
    if highest >= rows:
        raise CurvlibError(
            f"the chats have token {highest} and {base!r} {rows} rows of embedding: give the tokenizer that fits it"
        )
    return models.load_adapter(model, adapter)


def pair_tokenizer(base: str, adapter: Path) -> PreTrainedTokenizerBase:
    """Return the adapter's own tokenizer and template where its folder has them, else the base's.

    Raises:
        CurvlibError: the folder holds no plain LoRA adapter, or its tokens have other numbers than the base's.
    """
    adapter_settings(adapter)
    of_base = models.load_tokenizer(base, chat=False)
    template, own = adapter / "chat_template.jinja", (adapter / "tokenizer_config.json").is_file()
    tokenizer = models.load_tokenizer(str(adapter), chat=False) if own else of_base
    vocabulary, expected = tokenizer.get_vocab(), of_base.get_vocab()
    taken = {token: word for word, token in expected.items()}
    other = [word for word, token in vocabulary.items() if expected.get(word, token) != token]
    other += [word for word, token in vocabulary.items() if taken.get(token, word) != word]
    if other:
        names = f"the tokenizers of {adapter} and {base!r}"
        raise CurvlibError(f"{names} differ (in {min(other)!r}): give the base that the adapter was trained on")
    template_of_base = of_base.chat_template
    if template.is_file():
        tokenizer.chat_template = template.read_text("utf-8")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = template_of_base
    if tokenizer.chat_template != template_of_base:
        say(f"the adapter has a chat template of its own: {base!r}, before and after are all measured in it")
    return models.chat_tokenizer(tokenizer, str(adapter) if own else base)
