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

from expert_store.encoding import RowEncoding
from expert_store.manifest import LayerSpec, write_manifest
from expert_store.rows import FIELD_DTYPES, TORCH_DTYPES, pack_rows
from expert_store.shard import ShardLayout
from expert_store.store import Store
from extractor.encoding.quantise import quantise


def encoded_rows(weight: Tensor, encoding: RowEncoding) -> Tensor:
    """uint8 [O, row bytes] of a weight [O, N], also for fields that extraction only copies: I16 zeros, divisors."""
    made = quantise(weight, replace(encoding, zeros=encoding.zeros and "U8", overall=encoding.overall and "factor"))
    zeros = made.zeros if encoding.zeros is None else made.zeros.to(FIELD_DTYPES[encoding.zeros])
    overall = 1 / made.overall if encoding.overall == "divisor" else made.overall
    return pack_rows(encoding, replace(made, zeros=zeros, overall=overall))


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
