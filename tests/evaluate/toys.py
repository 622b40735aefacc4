"""A tiny chat tokenizer and tiny Llama models; nothing is downloaded."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]
TEXT = "A B C : . The answer is Write something plan a list of words red green blue one two three four five six"
WORDS = list(dict.fromkeys(re.findall(r"\S+", TEXT)))
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    result: PreTrainedTokenizerFast = make(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        extra_special_tokens=SPECIAL[3:],
    )
    result.chat_template = TEMPLATE
    return result


def llama(seed: int = 0, *, uniform: bool = False) -> LlamaForCausalLM:
    """A random Llama with lively answers; with `uniform` every next token is equally likely."""
    make: Any = LlamaConfig
    config = make(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.6)
    if uniform:
        torch.nn.init.zeros_(model.lm_head.weight)
    return model


def adapted(*, frozen: bool = False) -> PeftModel:
    """The random Llama with a LoRA that changes its answers."""
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], inference_mode=frozen)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft 0.21 asks the old name
        model = get_peft_model(llama(), config)
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def dense_losses(model: LlamaForCausalLM, head: list[int], tail: list[int]) -> torch.Tensor:
    """Negative log-likelihoods of `tail` after `head`: one row, no padding, every logit, float64."""
    model.train(False)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([head + tail])).logits[0].double()
    chosen = logits.log_softmax(-1)[len(head) - 1 : -1]
    return -chosen[torch.arange(len(tail)), torch.tensor(tail)]
