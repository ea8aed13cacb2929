"""Tiny random checkpoints of the families of this package, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

NUM_EXPERTS, TOP_K = 6, 2
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "olmoe": {"num_experts": NUM_EXPERTS},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_QWEN, "head_dim": 8, "tie_word_embeddings": True},
}


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Any:
    """A random model of `family`: 3 layers (qwen: the middle one dense), 6 experts, top-2."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**_COMMON | _OF_FAMILY[family] | sizes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def write_tokenizer(directory: Path, num_tokens: int = 64, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a tokenizer of single characters, the last of which are unused."""
    letters = "<> abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    ids = {letter: number for number, letter in enumerate(letters)}
    ids |= {f"unused {number}": number for number in range(len(ids), num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = chat_template
    fast.save_pretrained(directory)


def save_checkpoint(directory: Path, family: str, seed: int = 0, shards: bool = False) -> Path:
    """Write a random checkpoint of `family` in one file, or in several with an index."""
    model = make_model(family, seed)
    model.save_pretrained(directory, max_shard_size="30KB" if shards else "1GB")
    write_tokenizer(directory)
    assert (directory / "model.safetensors.index.json").exists() == shards
    return directory
