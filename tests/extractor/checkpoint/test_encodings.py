"""Every encoding's values equal, bit for bit, those of the library that defines the format; its rows lose nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from safetensors.torch import save_file
from torch import Tensor

from expert_store.encoding import RowEncoding
from expert_store.rows import RowFields, decode_fields, decode_rows, unpack_rows
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.quantised import QuantisedEntry, read_part, rows_of
from extractor.errors import CheckpointError, UnsupportedFamilyError
from tests.extractor.packed import (
    AWQ_NIBBLES,
    MXFP4,
    NVFP4,
    awq,
    compress,
    decompress,
    fp8_blocks,
    gptq,
    integers,
    modelopt_nvfp4,
    pack_fused_mxfp4,
    pack_words,
)

ROWS, COLUMNS = 48, 256


def random_weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


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


def expect(
    weight: Tensor,
    encoding: RowEncoding,
    folder: Path,
    stored: dict[str, Tensor],
    quantisation: dict[str, Any] | None = None,
) -> None:
    """The layer `a` has the library's weight, plain and by rows, and its rows hold what was shipped.

    Args:
        weight: in the dtype that the library computes in.
    """
    (entry,) = checkpoint_of(folder, stored, quantisation).tensors.values()
    assert isinstance(entry, QuantisedEntry)
    assert torch.equal(read_part(entry), weight.to(torch.bfloat16))
    assert (entry.encoding.rows, entry.encoding.obstacle) == (encoding, "")
    piece = rows_of(entry)
    rows = torch.frombuffer(bytearray(piece.load()), dtype=torch.uint8).view(len(weight), -1)
    assert rows.numel() == piece.num_bytes
    assert torch.equal(decode_rows(encoding, weight.shape[1], rows).to(weight.dtype), weight)
    numbers = unpack_rows(encoding, weight.shape[1], rows)
    for role, tensor in shipped_again(numbers, stored, quantisation or {}).items():
        assert tensor.shape == stored[role].shape
        assert tensor.dtype == stored[role].dtype
        again, once = (one.clone(memory_format=torch.contiguous_format) for one in (tensor, stored[role]))
        assert torch.equal(again.flatten().view(torch.uint8), once.flatten().view(torch.uint8)), role


def shipped_again(fields: RowFields, stored: dict[str, Tensor], quantisation: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that a matrix's numbers came from; `stored` are those, for their names, shapes and dtypes."""
    codes, columns = fields.codes, fields.codes.shape[1]
    if "qweight" in stored:
        return columns_again(fields, stored, quantisation)
    if "weight_packed" in stored and stored["weight_packed"].dtype == torch.int32:
        bits = 32 * stored["weight_packed"].shape[1] // columns
        found = {"weight_packed": pack_words(codes, bits), "weight_scale": fields.scales}
        if fields.zeros is not None:
            found["weight_zero_point"] = pack_words(fields.zeros.T, bits).T
        return found
    name = "weight_packed" if "weight_packed" in stored else "weight"
    scale = next(role for role in ("weight_scale", "weight_scale_inv", "scale") if role in stored)
    if stored[name].shape[1] < columns:
        found = {name: (codes[:, 0::2] | codes[:, 1::2] << 4).view(stored[name].dtype)}
        for role in ("weight_global_scale", "weight_scale_2"):
            if role in stored:
                assert fields.overall is not None
                found[role] = fields.overall[0].reshape(stored[role].shape)
        return found | {scale: fields.scales.view(stored[scale].dtype)}
    found = {name: (codes ^ 128 if stored[name].dtype == torch.int8 else codes).view(stored[name].dtype)}
    if "weight_zero_point" in stored:
        assert fields.zeros is not None
        found["weight_zero_point"] = (fields.zeros ^ 128).view(torch.int8)
    height, width = quantisation.get("weight_block_size", (len(codes) // stored[scale].shape[0], columns))
    step = max(1, width * fields.scales.shape[1] // columns)
    return found | {scale: fields.scales[::height, ::step].view(stored[scale].dtype)}


def columns_again(fields: RowFields, stored: dict[str, Tensor], quantisation: dict[str, Any]) -> dict[str, Tensor]:
    assert fields.zeros is not None
    if quantisation["quant_method"] == "awq":
        words, zeros = pack_words(fields.codes.T, 4, AWQ_NIBBLES), pack_words(fields.zeros.T, 4, AWQ_NIBBLES)
    else:
        less = 0 if quantisation.get("checkpoint_format") == "gptq_v2" else 1
        bits = quantisation["bits"]
        words, zeros = pack_words(fields.codes, bits).T, pack_words(fields.zeros.T - less, bits)
    return {"qweight": words, "qzeros": zeros, "scales": fields.scales.T}


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers(bits: int, symmetric: bool, group: int | None, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "format_name": "pack-quantized",
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
    }
    stored = compress(random_weight(), **arguments)
    encoding = RowEncoding("int4" if bits == 4 else "int8", group or COLUMNS, "BF16", None if symmetric else "U8")
    quantisation = {"quant_method": "compressed-tensors"}
    expect(decompress(stored, **arguments), encoding, tmp_path, stored, quantisation)


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
    assert obstacle(tmp_path, stored) == "20 columns are no whole groups of 8 or more"


def obstacle(folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any] | None = None) -> str:
    """The reason why the layer `a` has no rows."""
    (entry,) = checkpoint_of(folder, tensors, quantisation).tensors.values()
    assert isinstance(entry, QuantisedEntry)
    return entry.encoding.obstacle


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8_by_channel_and_by_tensor_told_by_no_config(strategy: str, scales: torch.dtype, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "format_name": "float-quantized",
        "num_bits": 8,
        "type": "float",
        "strategy": strategy,
    }
    stored = compress(random_weight(), **arguments)
    stored["weight_scale"] = stored["weight_scale"].to(scales)
    weight = decompress(stored, **arguments)
    stored["input_scale"] = torch.ones(1)  # for activations, which stay in 16 bits
    assert torch.equal(plain_weight(tmp_path, stored), weight.to(torch.bfloat16))
    values = stored["weight"].float() * stored["weight_scale"].float()  # the library rounds to the scales' dtype
    expect(values, RowEncoding("fp8", COLUMNS, "F32" if scales == torch.float32 else "BF16"), tmp_path, stored)


@pytest.mark.parametrize(("rows", "columns", "group"), [(256, 384, 128), (192, 224, 32), (48, 64, 64)])
def test_fp8_in_blocks(rows: int, columns: int, group: int, tmp_path: Path) -> None:
    """Blocks at the edges are smaller; where they cut a group short, all groups are as small as divides both."""
    stored = fp8_blocks(random_weight(rows, columns))
    weight = torch.empty(rows, columns)
    for at in range(0, rows, 128):
        for beside in range(0, columns, 128):
            block = (slice(at, at + 128), slice(beside, beside + 128))
            weight[block] = stored["weight"][block].float() * stored["weight_scale_inv"][at // 128, beside // 128]
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    expect(weight, RowEncoding("fp8", group, "F32"), tmp_path, stored, quantisation)


def test_e5m2_is_dequantised(tmp_path: Path) -> None:
    codes, scales = random_weight().to(torch.float8_e5m2), torch.rand(ROWS, 1)
    stored = {"weight": codes, "weight_scale": scales}
    assert torch.equal(plain_weight(tmp_path, stored), (codes.float() * scales).to(torch.bfloat16))
    assert obstacle(tmp_path, stored) == "its codes are E5M2"


def test_scales_of_float64_are_dequantised(tmp_path: Path) -> None:
    stored = {"weight": random_weight().to(torch.float8_e4m3fn), "weight_scale": torch.rand(ROWS, 1).double()}
    assert obstacle(tmp_path, stored) == "its scales are F64"


def test_mxfp8_has_an_exponent_for_32_columns(tmp_path: Path) -> None:
    codes = random_weight().to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    weight = codes.float() * (exponents.float() - 127).exp2().repeat_interleave(32, dim=1)
    stored = {"weight": codes, "weight_scale": exponents}
    expect(weight, RowEncoding("fp8", 32, "F8_E8M0"), tmp_path, stored, {"weight_block_size": [1, 32]})


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_by_channel(symmetric: bool, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "format_name": "int-quantized",
        "num_bits": 8,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel",
    }
    stored = compress(random_weight(), **arguments)
    encoding = RowEncoding("int8", COLUMNS, "BF16", None if symmetric else "U8")
    quantisation = {"quant_method": "compressed-tensors"}
    expect(decompress(stored, **arguments), encoding, tmp_path, stored, quantisation)


def test_nvfp4_of_compressed_tensors(tmp_path: Path) -> None:
    stored = compress(random_weight(), "nvfp4-pack-quantized", **NVFP4)
    weight = decompress(stored, "nvfp4-pack-quantized", **NVFP4)
    encoding = RowEncoding("fp4", 16, "F8_E4M3", overall="divisor")
    assert torch.equal(plain_weight(tmp_path, stored), weight.to(torch.bfloat16))
    scales = stored["weight_scale"].float() / stored["weight_global_scale"]
    values = decode_fields(RowEncoding("fp4", 16, "F32"), RowFields(nibbles(stored["weight_packed"]), scales))
    assert torch.equal(values.to(weight.dtype), weight)
    expect(values, encoding, tmp_path, stored, {"quant_method": "compressed-tensors"})


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    """The library that reads modelopt's files makes the factor a divisor, which rounds unless it is a power of two."""
    theirs = modelopt_nvfp4(random_weight()) | {"weight_scale_2": torch.tensor(0.5)}
    named = {f"a.{name}": tensor for name, tensor in theirs.items()}
    converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(dict(named))
    state = {
        name.removeprefix("a."): tensor.reshape(-1) if tensor.dim() == 0 else tensor
        for name, tensor in converted.items()
    }
    weight = decompress(state, "nvfp4-pack-quantized", **NVFP4)
    expect(weight, RowEncoding("fp4", 16, "F8_E4M3", overall="factor"), tmp_path, theirs)


def test_mxfp4_of_compressed_tensors(tmp_path: Path) -> None:
    stored = compress(random_weight(), "mxfp4-pack-quantized", **MXFP4)
    weight = decompress(stored, "mxfp4-pack-quantized", **MXFP4)
    quantisation = {"quant_method": "compressed-tensors"}
    expect(weight, RowEncoding("fp4", 32, "F8_E8M0"), tmp_path, stored, quantisation)


def test_mxfp4_beside_a_scale_of_exponents(tmp_path: Path) -> None:
    """DeepSeek-V4 names the same values `weight` (int8) and `scale` (E8M0)."""
    stored = compress(random_weight(), "mxfp4-pack-quantized", **MXFP4)
    weight = decompress(stored, "mxfp4-pack-quantized", **MXFP4)
    renamed = {
        "weight": stored["weight_packed"].view(torch.int8),
        "scale": stored["weight_scale"].view(torch.float8_e8m0fnu),
    }
    expect(weight, RowEncoding("fp4", 32, "F8_E8M0"), tmp_path, renamed, {"quant_method": "fp8"})


def test_mxfp4_of_gpt_oss_has_the_rows_of_its_transposed_experts(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, quantisation = pack_fused_mxfp4({"experts.gate_up_proj": torch.randn(3, COLUMNS, ROWS)})
    weight = convert_moe_packed_tensors(stored["experts.gate_up_proj_blocks"], stored["experts.gate_up_proj_scales"])
    (entry,) = checkpoint_of(tmp_path, stored, quantisation).tensors.values()
    assert isinstance(entry, QuantisedEntry)
    assert torch.equal(read_part(entry), weight)
    assert (entry.encoding.rows, entry.encoding.obstacle) == (RowEncoding("fp4", 32, "F8_E8M0"), "")
    for expert in range(3):
        rows = torch.frombuffer(bytearray(rows_of(entry, expert, 3).load()), dtype=torch.uint8).view(ROWS, -1)
        assert torch.equal(decode_rows(entry.encoding.rows, COLUMNS, rows).T, weight[expert].float())
        fields = unpack_rows(entry.encoding.rows, COLUMNS, rows)
        blocks = (fields.codes[:, 0::2] | fields.codes[:, 1::2] << 4).view(ROWS, -1, 16)
        assert torch.equal(blocks, stored["experts.gate_up_proj_blocks"][expert])
        assert torch.equal(fields.scales, stored["experts.gate_up_proj_scales"][expert])


def test_awq_equals_the_conversion_of_compressed_tensors(tmp_path: Path) -> None:
    stored = awq(random_weight(), group=128)
    converter = AutoAWQConverter(group_size=128)
    named = {f"a.{name}": tensor.contiguous() for name, tensor in stored.items()}
    state = {name.removeprefix("a."): tensor for name, tensor in converter.process(named).items()}
    arguments = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
    weight = decompress(state, "pack-quantized", **arguments)
    quantisation = {"quant_method": "awq", "bits": 4}
    expect(weight, RowEncoding("int4", 128, "F16", "U8"), tmp_path, stored, quantisation)


def test_gptq_by_channel_has_one_group_a_row(tmp_path: Path) -> None:
    stored = gptq(random_weight(), group=COLUMNS)
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    codes, zeros, scales = integers(random_weight(), 4, COLUMNS)
    weight = ((codes - zeros).float() * scales.float()).half()
    expect(weight, RowEncoding("int4", COLUMNS, "F16", "U8"), tmp_path, stored, quantisation)


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    stored = gptq(random_weight())
    stored["g_idx"] = stored["g_idx"] + 1
    with pytest.raises(CheckpointError, match="have a group in g_idx that is none of the 8"):
        _ = checkpoint_of(tmp_path, stored, {"quant_method": "gptq"}).tensors


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(act_order: bool, checkpoint_format: str, bits: int, tmp_path: Path) -> None:
    """The formula of AutoGPTQ and GPTQModel, value by value: (code − (zero + 1)) · scale, in half precision."""
    less = 1 if checkpoint_format == "gptq" else 0
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (COLUMNS, ROWS), generator=generator)
    zeros = torch.randint(0, 2**bits, (2, ROWS), generator=generator) + less
    scales = torch.rand(2, ROWS, generator=generator).half()
    g_idx = torch.arange(COLUMNS, dtype=torch.int32) // 128
    if act_order:
        g_idx = g_idx[torch.randperm(COLUMNS, generator=generator)]
    stored = {
        "qweight": pack_words(codes.T, bits).T,
        "qzeros": pack_words(zeros - less, bits),
        "scales": scales,
        "g_idx": g_idx,
    }
    expected = torch.empty(ROWS, COLUMNS, dtype=torch.float16)
    for column in range(COLUMNS):
        group = int(g_idx[column])
        expected[:, column] = (codes[column] - zeros[group]).half() * scales[group]
    quantisation = {"quant_method": "gptq", "bits": bits, "checkpoint_format": checkpoint_format}
    if act_order:
        assert torch.equal(plain_weight(tmp_path, stored, quantisation), expected.to(torch.bfloat16))
        assert obstacle(tmp_path, stored, quantisation) == "its columns are in the order of activations"
    else:
        encoding = RowEncoding("int4" if bits == 4 else "int8", 128, "F16", "I16" if less and bits == 8 else "U8")
        expect(expected, encoding, tmp_path, stored, quantisation)


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
