"""Run what all rows of a batch begin with only once: a chat template opens every prompt with the same tokens."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

PLAIN = {  # families (transformers' model_type) whose layers attend to all earlier tokens, by their positions alone
    *("cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2"),
    *("phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
}


def shares_beginnings(model: Any) -> bool:
    """Tell whether rows may share a beginning: every layer is plain full attention, and none is checkpointed.

    A shared beginning puts padding between itself and the rest of a short row. Where attention counts columns instead
    of positions (a sliding window, ALiBi, a recurrence), distances grow by it. Checkpointed layers drop the cache.
    """
    config = model.config
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "model_type", None) not in PLAIN or window or not kinds <= {"full_attention"}:
        return False
    return not any(vars(m).get("gradient_checkpointing") and m.training for m in model.modules())


def token_positions(mask: Tensor) -> Tensor:
    """Return each token's place (B, T) in its own row, from an attention mask; padding takes no place."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def cache_argument(model: Any) -> str:
    """Return the name under which ``model`` takes its key-value cache: transformers changed it in version 5.24."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in signature(type(base).forward).parameters else "past_key_values"


def common_beginning(ids: Tensor, mask: Tensor, most: int) -> int:
    """Return how many tokens, at most ``most``, all rows of left-padded ids (B, T) begin with.

    >>> common_beginning(torch.tensor([[0, 5, 6, 7], [5, 6, 8, 9]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), 3)
    2
    """
    most = max(0, most)
    places = (mask.shape[1] - mask.sum(dim=1))[:, None] + torch.arange(most, device=ids.device)
    heads = ids.gather(1, places)
    return int((heads == heads[0]).all(dim=0).long().cumprod(dim=0).sum())


def read_beginning(model: Any, ids: Tensor, mask: Tensor, most: int, *, keep: bool = False) -> dict[str, Any]:
    """Run the common beginning of all rows once, and return the arguments of the call that runs the rest.

    Args:
        model: a decoder-only language model. Gradients flow through the beginning, from every row.
        ids: left-padded tokens (B, T).
        mask: 1 at tokens, 0 at padding, (B, T).
        most: tokens that may be taken from a row; each has more than that.
        keep: give the call a cache even where rows have no beginning in common, for a decoding that goes on from it.

    Models that :func:`shares_beginnings` does not know as plain read all rows whole.

    Returns:
        ``input_ids`` and ``position_ids`` (B, T - P) of what is left, still left-padded; ``attention_mask`` (B, T) of
        the P tokens read and of what is left; ``use_cache``, and the cache with the P tokens' keys and values.

    Cost: one forward over (1, P).
    """
    count = common_beginning(ids, mask, most) if len(ids) > 1 and shares_beginnings(model) else 0
    if not (count or keep):
        return {"input_ids": ids, "attention_mask": mask, "position_ids": token_positions(mask), "use_cache": False}
    name, cache = cache_argument(model), DynamicCache(config=model.config)
    if count:
        padding = (mask.shape[1] - mask.sum(dim=1))[:, None]
        first = int(padding[0])
        model(input_ids=ids[:1, first : first + count], logits_to_keep=1, use_cache=True, **{name: cache})
        cache.batch_repeat_interleave(len(ids))
        places = torch.arange(ids.shape[1] - count, device=ids.device).expand(len(ids), -1)
        kept = places + count * (places >= padding)
        ids, mask = ids.gather(1, kept), nn.functional.pad(mask.gather(1, kept), (count, 0), value=1)
    positions = token_positions(mask)[:, mask.shape[1] - ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True, name: cache}
