"""Every encoding's values equal, bit for bit, those of the library that defines the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.quantised import read_part
from extractor.errors import CheckpointError, UnsupportedFamilyError

ROWS, COLUMNS = 48, 256


def scheme_of(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def compressed(format_name: str, scheme: QuantizationScheme) -> tuple[dict[str, Tensor], Tensor]:
    """A random linear layer as compressed-tensors stores it, and the weight that it decompresses to."""
    args = scheme.weights
    assert args is not None
    generator = torch.Generator().manual_seed(0)
    group = args.group_size or COLUMNS
    rows = 1 if args.strategy == "tensor" else ROWS
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(torch.bfloat16)
    top = {("float", 8): 448.0, ("float", 4): 6.0}.get((str(args.type), args.num_bits), 7.0)
    largest = weight.float().reshape(rows, -1, group if rows > 1 else ROWS * COLUMNS).abs().amax(-1)
    state: dict[str, Tensor] = {"weight": weight, "weight_scale": (largest / top).to(torch.bfloat16)}
    if args.strategy == "tensor_group":
        state["weight_scale"] = (largest / top).clamp(max=4).to(torch.float8_e4m3fn).to(torch.bfloat16)
        state["weight_global_scale"] = torch.tensor([1.7])
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-4, 4, state["weight_scale"].shape, generator=generator).to(
            torch.int8
        )
    compressor = BaseCompressor.get_value_from_registry(format_name)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def checkpoint_of(
    folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any] | None = None, stem: str = "a"
) -> Checkpoint:
    save_file({f"{stem}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {} if quantisation is None else {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def plain_weight(folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any] | None = None) -> Tensor:
    """What a checkpoint with the one layer `a` is read as; nothing but its weight is left."""
    (entry,) = checkpoint_of(folder, tensors, quantisation).tensors.values()
    assert entry.name == "a.weight"
    return read_part(entry)


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers(bits: int, symmetric: bool, group: int | None, tmp_path: Path) -> None:
    strategy = "channel" if group is None else "group"
    scheme = scheme_of(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group)
    stored, weight = compressed("pack-quantized", scheme)
    assert torch.equal(plain_weight(tmp_path, stored, {"quant_method": "compressed-tensors"}), weight)


def test_packed_integers_of_columns_that_do_not_fill_a_word(tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-8, 8, (4, 20), dtype=torch.int8)
    scales = torch.rand(4, 1).to(torch.bfloat16)
    stored = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    assert torch.equal(plain_weight(tmp_path, stored), codes * scales)


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8_by_channel_and_by_tensor_told_by_no_config(strategy: str, scales: torch.dtype, tmp_path: Path) -> None:
    stored, _ = compressed("float-quantized", scheme_of(num_bits=8, type="float", strategy=strategy))
    stored["weight_scale"] = stored["weight_scale"].to(scales)
    scheme = scheme_of(num_bits=8, type="float", strategy=strategy)
    weight = BaseCompressor.get_value_from_registry("float-quantized").decompress(stored, scheme)["weight"]
    stored["input_scale"] = torch.ones(1)  # for activations, which stay in 16 bits
    assert torch.equal(plain_weight(tmp_path, stored), weight.to(torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_by_channel(symmetric: bool, tmp_path: Path) -> None:
    stored, weight = compressed(
        "int-quantized", scheme_of(num_bits=8, type="int", symmetric=symmetric, strategy="channel")
    )
    assert torch.equal(plain_weight(tmp_path, stored, {"quant_method": "compressed-tensors"}), weight)


def test_nvfp4_of_compressed_tensors(tmp_path: Path) -> None:
    scheme = scheme_of(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    stored, weight = compressed("nvfp4-pack-quantized", scheme)
    assert torch.equal(plain_weight(tmp_path, stored, {"quant_method": "compressed-tensors"}), weight)


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    """The library that reads modelopt's files makes the factor a divisor, which rounds unless it is a power of two."""
    scheme = scheme_of(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    stored, weight = compressed("nvfp4-pack-quantized", scheme)
    theirs = {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": torch.tensor(0.5),
        "input_scale": torch.tensor(0.25),
    }
    named = {f"a.{name}": tensor for name, tensor in theirs.items()}
    converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(dict(named))
    state = {
        name.removeprefix("a."): tensor.reshape(-1) if tensor.dim() == 0 else tensor
        for name, tensor in converted.items()
    }
    weight = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(state, scheme)["weight"]
    assert torch.equal(plain_weight(tmp_path, theirs), weight)


def test_mxfp4_of_compressed_tensors(tmp_path: Path) -> None:
    scheme = scheme_of(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32)
    stored, weight = compressed("mxfp4-pack-quantized", scheme)
    assert torch.equal(plain_weight(tmp_path, stored, {"quant_method": "compressed-tensors"}), weight)


def test_mxfp4_beside_a_scale_of_exponents(tmp_path: Path) -> None:
    """DeepSeek-V4 names the same values `weight` (int8) and `scale` (E8M0)."""
    scheme = scheme_of(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32)
    stored, weight = compressed("mxfp4-pack-quantized", scheme)
    renamed = {
        "weight": stored["weight_packed"].view(torch.int8),
        "scale": stored["weight_scale"].view(torch.float8_e8m0fnu),
    }
    assert torch.equal(plain_weight(tmp_path, renamed, {"quant_method": "fp8"}), weight)


def pack_columns(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Codes [R, C] of four bits → int32 [R, C / 8], column i of eight in nibble order[i]."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for column, nibble in enumerate(order):
        words |= codes[:, column::8].long() << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def test_awq_equals_the_conversion_of_compressed_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (COLUMNS, ROWS), generator=generator)
    zeros = torch.randint(0, 16, (2, ROWS), generator=generator)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    stored = {
        "qweight": pack_columns(codes, order),
        "qzeros": pack_columns(zeros, order),
        "scales": torch.rand(2, ROWS, generator=generator).half(),
    }
    converter = AutoAWQConverter(group_size=128)
    named = {f"a.{name}": tensor.clone() for name, tensor in stored.items()}
    state = {name.removeprefix("a."): tensor for name, tensor in converter.process(named).items()}
    scheme = scheme_of(num_bits=4, type="int", symmetric=False, strategy="group", group_size=128)
    weight = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
    assert torch.equal(plain_weight(tmp_path, stored, {"quant_method": "awq", "bits": 4}), weight.to(torch.bfloat16))


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(act_order: bool, checkpoint_format: str, tmp_path: Path) -> None:
    """The formula of AutoGPTQ and GPTQModel, value by value: (code − (zero + 1)) · scale, in half precision."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (COLUMNS, ROWS), generator=generator)
    stored_zeros = torch.randint(0, 15, (2, ROWS), generator=generator)
    scales = torch.rand(2, ROWS, generator=generator).half()
    g_idx = torch.arange(COLUMNS, dtype=torch.int32) // 128
    if act_order:
        g_idx = g_idx[torch.randperm(COLUMNS, generator=generator)]
    stored = {
        "qweight": pack_columns(codes.T, tuple(range(8))).T,
        "qzeros": pack_columns(stored_zeros, tuple(range(8))),
        "scales": scales,
        "g_idx": g_idx,
    }
    zeros = stored_zeros + (checkpoint_format == "gptq")
    expected = torch.empty(ROWS, COLUMNS, dtype=torch.float16)
    for column in range(COLUMNS):
        group = int(g_idx[column])
        expected[:, column] = (codes[column] - zeros[group]).half() * scales[group]
    quantisation = {"quant_method": "gptq", "bits": 4, "checkpoint_format": checkpoint_format}
    assert torch.equal(plain_weight(tmp_path, stored, quantisation), expected.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ({"weight": torch.zeros(4, 32).to(torch.float8_e4m3fn)}, r"need scales|need a\.weight_scale"),
        ({"weight": torch.zeros(4, 32, dtype=torch.uint8)}, r"need a\.weight_scale"),
        ({"weight": torch.zeros(4, 32, dtype=torch.int8)}, r"need a\.weight_scale"),
        ({"weight_scale": torch.ones(4)}, "are of no encoding known here"),
        ({"weight": torch.zeros(4, 32), "weight_scale": torch.ones(4)}, "are of no encoding known here"),
        (
            {
                "weight": torch.zeros(4, 32).to(torch.float8_e4m3fn),
                "weight_scale": torch.ones(4, 1),
                "weight_scale_2": torch.ones(1),
            },
            r"leave a\.weight_scale_2 over",
        ),
        ({"weight": torch.zeros(4, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(3, 1)}, "do not fit"),
        (
            {
                "weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
                "weight_scale": torch.ones(4, 4).to(torch.float8_e4m3fn),
            },
            "are no four-bit codes",
        ),
        (
            {
                "weight_packed": torch.zeros(4, 3, dtype=torch.int32),
                "weight_scale": torch.ones(4, 1),
                "weight_shape": torch.tensor([4, 32]),
            },
            "are no codes of 4 or 8 bits",
        ),
        ({"qweight": torch.zeros(4, 8, dtype=torch.int32), "scales": torch.ones(1, 8)}, r"need a\.qzeros"),
        (
            {
                "qweight": torch.zeros(4, 8, dtype=torch.int32),
                "scales": torch.ones(1, 8).half(),
                "qzeros": torch.zeros(1, 3, dtype=torch.int32),
            },
            "are no codes of 4 or 8 bits as GPTQ or AWQ",
        ),
    ],
)
def test_packed_tensors_that_are_not_understood_are_refused(
    stored: dict[str, Tensor], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        _ = checkpoint_of(tmp_path, stored).tensors


def test_parameters_of_ordinary_models_called_scale_are_left_alone(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(4, 4), "scale": torch.ones(4), "k_scale": torch.ones(1)}
    assert set(checkpoint_of(tmp_path, tensors).tensors) == {"a.weight", "a.scale", "a.k_scale"}


@pytest.mark.parametrize("beside", ["transform_config", "sparsity_config"])
def test_transforms_of_the_weights_are_refused_by_name(beside: str) -> None:
    from extractor.checkpoint.quantised import check_quantisation

    config = {"quantization_config": {"quant_method": "compressed-tensors", beside: {"format": "x"}}}
    with pytest.raises(UnsupportedFamilyError, match=f"compressed-tensors with a {beside}"):
        check_quantisation(config, "it")
