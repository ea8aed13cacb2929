"""Stores whose experts are encoded again: every encoding at any layer, also those that no checkpoint ships."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from expert_store.encoding import CODE_BITS, RowEncoding
from expert_store.manifest import LayerSpec, write_manifest
from expert_store.rows import E2M1, FIELD_DTYPES, RowFields, decode_rows, pack_rows
from expert_store.shard import ShardLayout
from expert_store.slots import TORCH_DTYPES
from expert_store.store import Store


def encoded_rows(weight: Tensor, encoding: RowEncoding) -> Tensor:
    """uint8 [O, row bytes]: the nearest codes of a weight [O, N], each group scaled to its largest number."""
    codes = torch.arange(1 << CODE_BITS[encoding.codes], dtype=torch.uint8)
    values = codes.float() - encoding.middle
    if encoding.codes == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
        codes, values = codes[~values.isnan()], values[~values.isnan()]
    elif encoding.codes == "fp4":
        values = torch.tensor(E2M1)
    values, order = values.sort()
    groups = weight.float().view(len(weight), -1, encoding.group)
    scales = groups.abs().amax(-1).clamp(min=1e-6) / values.max()
    overall = None
    if encoding.overall is not None:
        overall = scales.amax(-1) / 448
        scales = scales / overall[:, None]
        overall = 1 / overall if encoding.overall == "divisor" else overall
    if encoding.scales == "F8_E8M0":
        stored = (scales.log2().ceil() + 127).to(torch.uint8)
    else:
        stored = scales.to(FIELD_DTYPES[encoding.scales])
    zeros = torch.full(scales.shape, encoding.middle).to(FIELD_DTYPES[encoding.zeros]) if encoding.zeros else None
    ones = RowFields(
        torch.full(weight.shape, int(codes[order][values.argmax()]), dtype=torch.uint8), stored, zeros, overall
    )
    unit = decode_rows(encoding, weight.shape[1], pack_rows(encoding, ones)) / values.max()
    nearest = torch.bucketize((weight.float() / unit).contiguous(), (values[1:] + values[:-1]) / 2)
    return pack_rows(encoding, replace(ones, codes=codes[order][nearest]))


def repack(store: Path, folder: Path, encodings: Mapping[str, RowEncoding], *, transposed: bool = False) -> Path:
    """A copy of a store in which the named tensors of every expert are encoded.

    Groups are made smaller where a tensor has fewer columns. `transposed`: the source has input rows first.
    """
    source = Store.open(store)
    layers = tuple(_layer(spec, encodings, transposed) for spec in source.manifest.layers)
    shutil.copytree(store, folder)
    deep_experts = []
    for deep in source.manifest.deep_experts:
        layout = ShardLayout(layers, deep.index, deep.experts)
        spans = []
        for layer, expert in enumerate(deep.experts):
            span = torch.empty(source.layer_spec(layer).span_bytes, dtype=torch.uint8)
            source.read_expert(layer, expert, span)
            spans.append(_encoded(span, source.layer_spec(layer), layers[layer], transposed))
        content = layout.header + b"".join(spans)
        (folder / deep.file).write_bytes(content)
        deep_experts.append(
            replace(
                deep,
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                data_offset=layout.data_offset,
                span_hashes=tuple(map(xxhash.xxh3_64_hexdigest, spans)),
            )
        )
    source.close()
    write_manifest(folder, replace(source.manifest, layers=layers, deep_experts=tuple(deep_experts)))
    return folder


def _layer(spec: LayerSpec, encodings: Mapping[str, RowEncoding], transposed: bool) -> LayerSpec:
    tensors, at = [], 0
    for tensor in spec.tensors:
        if (encoding := encodings.get(tensor.name)) is not None:
            shape = tensor.shape[::-1] if transposed else tensor.shape
            encoding = replace(encoding, group=gcd(encoding.group, shape[1]))
            num_bytes = shape[0] * encoding.row_bytes(shape[1])
            tensor = replace(tensor, shape=shape, bytes=num_bytes, encoding=encoding)
        tensors.append(replace(tensor, offset=at))
        at += tensor.bytes
    return replace(spec, span_bytes=at, tensors=tuple(tensors))


def _encoded(span: Tensor, plain: LayerSpec, layer: LayerSpec, transposed: bool) -> bytes:
    parts = []
    for before, after in zip(plain.tensors, layer.tensors, strict=True):
        part = span[before.offset : before.offset + before.bytes]
        if after.encoding is not None:
            weight = part.view(TORCH_DTYPES[before.dtype]).view(before.shape)
            part = encoded_rows(weight.t() if transposed else weight, after.encoding)
        parts.append(part.numpy().tobytes())
    return b"".join(parts)
