"""One process of `benchmarks.cpu.packed`: llama.cpp on a GGUF file of the same weights, its figures as JSON.

The file is written first if it is not there. Matrices are quantised as llama.cpp's own tools do (the package gguf);
norms and routers stay float32. It has no vocabulary: tokens are numbers here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Tensors = dict[str, str]
"""The file of each of the checkpoint's tensors."""

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def write_gguf(path: Path, checkpoint: Path, kind: str) -> None:
    """Write a Qwen3-MoE checkpoint as GGUF, its matrices in `kind` (Q8_0, Q4_0)."""
    config = json.loads((checkpoint / "config.json").read_text())
    where: Tensors = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    writer = gguf.GGUFWriter(str(path) + ".part", "qwen3moe")
    _write_config(writer, config)
    quantisation = gguf.GGMLQuantizationType[kind]

    def add(name: str, values: npt.NDArray[np.float32]) -> None:
        if values.ndim == 1 or "gate_inp" in name:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)

    def read(name: str) -> npt.NDArray[np.float32]:
        with safe_open(checkpoint / where[name], framework="pt") as file:
            return np.asarray(file.get_tensor(name).float().numpy())

    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        add(f"{theirs}.weight", read(f"{ours}.weight"))
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in NAMES.items():
            add(f"blk.{layer}.{theirs}.weight", read(f"model.layers.{layer}.{ours}.weight"))
        for ours, theirs in EXPERTS.items():
            at = f"model.layers.{layer}.mlp.experts"
            matrices = [read(f"{at}.{expert}.{ours}.weight") for expert in range(config["num_experts"])]
            add(f"blk.{layer}.{theirs}.weight", np.stack(matrices))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(str(path) + ".part", path)


def _write_config(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def measure(path: Path, prompt_tokens: int, new_tokens: int, num_threads: int) -> dict[str, Any]:
    """Time a prompt and the tokens after it, after a shorter round that warms up."""
    import llama_cpp

    reader = gguf.GGUFReader(path)
    experts_bytes = sum(int(tensor.n_bytes) for tensor in reader.tensors if "_exps" in tensor.name)
    vocab_size = int(reader.fields["qwen3moe.vocab_size"].parts[-1][0])
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch = prompt_tokens + new_tokens + 64, prompt_tokens
    options.n_threads = options.n_threads_batch = num_threads
    context = llama_cpp.llama_init_from_model(model, options)
    tokens = np.random.default_rng(0).integers(0, vocab_size, prompt_tokens + new_tokens).tolist()

    def decode(ids: list[int]) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)  # the batch has only its address
        batch = llama_cpp.llama_batch_get_one(array, len(ids))
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError(f"llama.cpp could not compute {len(ids)} tokens")
        llama_cpp.llama_get_logits(context)[0]  # waits

    decode(tokens[:8])
    decode(tokens[8:9])
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    times = [time.perf_counter()]
    for ids in (tokens[:prompt_tokens], *([token] for token in tokens[prompt_tokens:])):
        decode(ids)
        times.append(time.perf_counter())
    return {
        "experts_bytes": experts_bytes,
        "tokens_per_second": new_tokens / (times[-1] - times[1]),
        "ttft_seconds": times[1] - times[0],
        "held_bytes": _rss_bytes(),
    }


def _rss_bytes() -> int:
    """Resident memory: llama.cpp maps the file, so its weights are no anonymous memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    gguf_path, source, quantised_as, *counts = sys.argv[1:]
    if not Path(gguf_path).is_file():
        write_gguf(Path(gguf_path), Path(source), quantised_as)
    print(json.dumps(measure(Path(gguf_path), *map(int, counts))))
