"""Checkpoints and stores that benchmarks run on: the bundled one, and generated ones that are mostly experts.

Generated checkpoints have the Qwen3-MoE layout, random weights and the bundled tokenizer; one tensor at a time is
written. Speed and memory do not depend on the weights, but for one thing: which experts a token demands. Embeddings are
large beside the layers' output, so that different tokens look different to the routers, and these spread them over all
experts: hard on a cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness.reporting import BUNDLED
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.encoding.names import ExpertsDtype
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare

FILE_BYTES = 10**9


@dataclass(frozen=True)
class Shape:
    """Sizes of a generated checkpoint; the default has 2.4 GB in bf16, 98 % of it experts."""

    num_layers: int = 16
    num_experts: int = 64
    top_k: int = 4
    hidden: int = 512
    intermediate: int = 768
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 8192
    context_tokens: int = 4096

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer in bf16."""
        return 2 * 3 * self.hidden * self.intermediate

    @property
    def experts_bytes(self) -> int:
        """Bytes of all experts."""
        return self.num_layers * self.num_experts * self.expert_bytes


def make_store(
    checkpoint: Path, folder: Path, count: int | None = None, experts_dtype: ExpertsDtype | None = None
) -> Path:
    """Extract `count` deep experts of a checkpoint (None: all) into the new store `folder`, and return it."""
    prepare(Checkpoint.open(checkpoint), folder, SelectionRequest(count=count), experts_dtype).run()
    return folder


def write_checkpoint(directory: Path, shape: Shape, *, seed: int = 0, device: str = "cpu") -> None:
    """Write a checkpoint of bf16 tensors into `directory`: standard deviation 0.02, embeddings 1, norms all ones.

    `device` draws the weights: a GPU does tens of GB in seconds, with other numbers than a CPU's. Holds one tensor at a
    time. A directory that already holds this very checkpoint is left as it is.
    """
    marker = directory / "generated.json"
    wanted = json.dumps({"seed": seed, **asdict(shape)})
    if marker.is_file() and marker.read_text() == wanted:
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(BUNDLED / name, directory / name)
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=1))
    generator = torch.Generator(device).manual_seed(seed)
    files = _files(shape)
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(directory / name, tensors, generator)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": sum(_bytes(s) for f in files for s in f.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    marker.write_text(wanted)


def _config(shape: Shape) -> dict[str, object]:
    config: dict[str, object] = json.loads((BUNDLED / "config.json").read_text())
    return config | {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "moe_intermediate_size": shape.intermediate,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": shape.context_tokens,
        "tie_word_embeddings": False,
    }


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = shape.hidden, shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    yield "lm_head.weight", (shape.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.q_norm.weight", (head,)
        yield f"{at}.self_attn.k_norm.weight", (head,)
        yield f"{at}.self_attn.q_proj.weight", (shape.num_heads * head, hidden)
        yield f"{at}.self_attn.k_proj.weight", (shape.num_kv_heads * head, hidden)
        yield f"{at}.self_attn.v_proj.weight", (shape.num_kv_heads * head, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, shape.num_heads * head)
        yield f"{at}.mlp.gate.weight", (shape.num_experts, hidden)
        for expert in range(shape.num_experts):
            yield f"{at}.mlp.experts.{expert}.gate_proj.weight", (shape.intermediate, hidden)
            yield f"{at}.mlp.experts.{expert}.up_proj.weight", (shape.intermediate, hidden)
            yield f"{at}.mlp.experts.{expert}.down_proj.weight", (hidden, shape.intermediate)


def _bytes(size: tuple[int, ...]) -> int:
    return 2 * torch.Size(size).numel()


def _files(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    files: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, size in _tensors(shape):
        if used + _bytes(size) > FILE_BYTES:
            files.append({})
            used = 0
        files[-1][name] = size
        used += _bytes(size)
    return files


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, begin + _bytes(size)]}
        begin += _bytes(size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in tensors.items():
            scale = 1.0 if "embed_tokens" in name else 0.02
            drawn = torch.randn(size, generator=generator, device=generator.device) if len(size) > 1 else None
            weights = torch.ones(size) if drawn is None else drawn * scale
            file.write(weights.bfloat16().cpu().view(torch.int16).numpy().data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    for field, default in asdict(Shape()).items():
        parser.add_argument("--" + field.replace("_", "-"), type=int, default=default)
    arguments = vars(parser.parse_args())
    write_checkpoint(arguments.pop("directory"), Shape(**arguments))
