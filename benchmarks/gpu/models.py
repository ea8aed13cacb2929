"""Captured steps of models that people run, in their real shapes with random weights, beside their own floors.

A shape is transformers' own config with the published sizes; the model is built without memory, packed as the server
packs a trunk, and every expert is in a slot. The *floor* is the time of reading the bytes that a step must read once
(packed trunk without the table of embeddings, and the distinct experts that the batch chose) at the read rate that the
card shows in the same run. A *stack* has the first layers of a model that does not fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.steps import STAGES, Replay, full_pages
from benchmarks.harness.reporting import environment, finish, table
from extractor.encoding import names
from server.model.device.capture import NotCapturableError
from server.model.device.capture.pack import decode_shape, pack_trunk
from server.model.device.step.graphs import in_parallel
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import DecodeShape
from server.model.seam.trunk import is_experts_module

DEVICE = torch.device("cuda:0")
MAX_TOKENS = 4096
TUNED: tuple[dict[str, Any], ...] = (
    {"qkv_rows": 2}, {"qkv_rows": 4}, {"output_rows": 2}, {"output_rows": 8}, {"head_rows": 4}, {"head_rows": 16},
    {"packed_up_rows": 1}, {"packed_up_rows": 4}, {"packed_down_rows": 2}, {"attention_splits": 4},
    {"attention_splits": 8}, {"attention_splits": 32}, {"attention_tile": 32}, {"attention_tile": 128},
    {"route_warps": 1}, {"route_warps": 4}, {"gate_rows": 1}, {"gate_rows": 4}, {"product_warps": 2},
    {"product_warps": 8},
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model to time: its config, I of its routed experts, their encoding by deepfew's name (None: bf16)."""

    family: str
    config: dict[str, Any]
    intermediate: int
    encoding: str | None = "int4-g64"


_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_YARN = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "rope_theta": 10000.0,
         "original_max_position_embeddings": 4096}  # fmt: skip
_DEEPSEEK = {
    **_MLA, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 6, "first_k_dense_replace": 1, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8,
    "topk_group": 4, "routed_scaling_factor": 2.5, "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
_QWEN3 = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
MODELS = {
    "Qwen3-30B-A3B": Model("qwen3_moe", _QWEN3, 768, None),
    "Qwen3-30B-A3B-int4": Model("qwen3_moe", _QWEN3, 768),
    "gpt-oss-20b": Model("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 2880, "mxfp4"),
    "gpt-oss-120b": Model("gpt_oss", {}, 2880, "mxfp4"),
    "Qwen3.6-35B-A3B": Model("qwen3_5_moe_text", {}, 512),
    "DeepSeek-V2-Lite": Model(
        "deepseek_v2",
        {
            **_MLA, "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27,
            "moe_intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
            "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
            "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
        1408,
    ),
    "GLM-4.7-Flash": Model("glm4_moe_lite", {}, 1536),
    "DeepSeek-V3, 6 layers": Model("deepseek_v3", _DEEPSEEK, 2048),
    "Kimi-K2, 5 layers": Model(
        "deepseek_v3",
        _DEEPSEEK | {
            "num_hidden_layers": 5, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
        },
        2048,
    ),
}  # fmt: skip


def random_model(model: Model) -> Any:
    """transformers' model of the config on the GPU in bf16 with random weights; its experts have no parameters."""
    config = AutoConfig.for_model(model.family, **model.config)
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for module in built.modules():
        if is_experts_module(module):
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                delattr(module, name)
    built.to_empty(device=DEVICE)
    with torch.no_grad():
        for name, tensor in [*built.named_parameters(), *built.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
            else:
                tensor.fill_(1.0 if "norm" in name else 0.01)
        built.lm_head.weight.normal_(0.0, config.hidden_size**-0.5)
    built.model.rotary_emb = type(built.model.rotary_emb)(config=config).to(DEVICE)
    return built.eval()


def shape_of(model: Model, built: Any, max_rows: int) -> DecodeShape:
    """The step's shape, with the experts in the model's encoding. Raises NotCapturableError."""
    up, down = built.config.hidden_size, model.intermediate
    packed = None
    if model.encoding is not None:
        packed = names.encoding_of(model.encoding, up), names.encoding_of(model.encoding, down)
    return decode_shape(built, intermediate=down, max_rows=max_rows, max_tokens=MAX_TOKENS, packed=packed)


def steps(name: str, batches: list[int], read_rate: float) -> list[dict[str, Any]]:
    """Times of one model's steps, a row for each batch size."""
    model, rows = MODELS[name], []
    built = random_model(model)
    shapes = {batch: shape_of(model, built, 8 if batch <= 8 else 32) for batch in batches}
    shape = shapes[batches[0]]
    trunk, pages = pack_trunk(built, shape), full_pages(replace(shape, max_rows=32), DEVICE)
    del built
    trunk_bytes = trunk.read_bytes
    for batch, one in shapes.items():
        state = RowState(one, DEVICE)
        options = StepOptions(pdl=batch == 1)
        with in_parallel():
            DecodeStep(one, trunk, pages, state, batch, options).compile()
        replay = Replay(one, trunk, pages, state, batch, options)
        step_ms = gpu_timing.median_ms(replay)
        assert bool(replay.step.logits.isfinite().all()), f"{name}: logits are not finite"
        ids = replay.step.log_ids.cpu()
        distinct = sum(len(set(layer.flatten().tolist())) for layer in ids)
        floor_ms = (trunk_bytes + distinct * one.span_bytes) / read_rate * 1e3
        row = {"model": name, "family": model.family, "experts": model.encoding or "bf16", "batch": batch}
        row |= {"step_ms": step_ms, "floor_ms": floor_ms, "ratio": step_ms / floor_ms, "trunk_bytes": trunk_bytes}
        rows.append(row | {"distinct": distinct, "held_bytes": torch.cuda.memory_allocated()})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        del state, replay
    return rows


def tuning(name: str) -> dict[str, float]:
    """Milliseconds of a model's step of one row: as it is, without each stage, and with other tile sizes."""
    model = MODELS[name]
    built = random_model(model)
    shape = shape_of(model, built, 8)
    trunk, pages, state = pack_trunk(built, shape), full_pages(shape, DEVICE), RowState(shape, DEVICE)
    del built
    base = StepOptions(pdl=True)
    changed = {json.dumps(one): replace(base, tuning=replace(base.tuning, **one)) for one in TUNED}
    with in_parallel():
        for options in (base, *changed.values()):
            DecodeStep(shape, trunk, pages, state, 1, options).compile()

    def timed(options: StepOptions, *without: str) -> float:
        return gpu_timing.median_ms(Replay(shape, trunk, pages, state, 1, options, without=without))

    whole = timed(base)
    stages = {f"stage {stage}": whole - timed(base, stage) for stage in STAGES}
    others = {label: timed(options) for label, options in changed.items()}
    return {"whole": whole, **stages, **others, "whole again": timed(base)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), help="by default all", default=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--tune", action="store_true", help="stages and other tile sizes of steps of one row instead")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/models_gpu.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": environment("cuda:0"), "read_rate": gpu_timing.read_rate(), "failed": {}}
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        began = time.perf_counter()
        try:
            if arguments.tune:
                result.setdefault("tuning", {})[name] = tuning(name)
                print(json.dumps(result["tuning"][name], indent=0))
            else:
                rows += steps(name, arguments.batches, result["read_rate"])
        except NotCapturableError as error:
            result["failed"][name] = f"not captured: {error}"
        except Exception as error:
            traceback.print_exc()
            result["failed"][name] = repr(error)[:300]
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    result["steps"] = rows
    if rows:
        print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print(json.dumps(result["failed"], indent=1))
    finish("models_gpu", result, save=arguments.save)


if __name__ == "__main__":
    main()
