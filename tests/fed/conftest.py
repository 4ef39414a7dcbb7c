"""A tiny language model that can be trained in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CORPUS = (
    "the quick brown fox jumps over the lazy dog and runs away from the small robot by the sea",
    "a fine film, a poor film: the answer is good or bad, and nobody knows which one it will be",
    "one two three four five six seven eight nine ten, once more from the beginning please",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_llama(folder: Path, *, template: str | None = TEMPLATE, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of two layers with grouped key-value heads and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    whole.save_pretrained(folder)
    values: dict[str, Any] = {
        "vocab_size": len(whole) + 3,  # more than the tokenizer has, as in many real models
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # wide enough that attention matters
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**values | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama: 2 layers, hidden 48, 6 heads and 2 key-value heads, context 256, a chat template."""
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def plain_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `llama`, other weights, without a chat template."""
    return write_llama(tmp_path_factory.mktemp("models") / "plain", template=None, seed=1)
