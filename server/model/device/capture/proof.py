"""The proof at start: the captured step computes what transformers' own forward of this model computes.

A few of the model's layers, at least one of each kind, get random float32 weights. A few tokens run through the
family's own forward and through the step's kernels, with a mask of experts and without. In float32 the results differ
only by rounding, so a scale, norm, activation, bias or window that the step lacks is detected. Random weights need no
loading, and none is zero, as trained biases may be. Experts get few inner elements and the vocabulary few tokens;
windows are shorter than the number of tokens.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from expert_store.paging.pages import DevicePages, PagesShape
from router.mask import ExpertMask
from server.model.device.capture import NotCapturableError, need
from server.model.device.capture.modules import TOWERS, embedding_of, moe_blocks, rotary_name, text_body
from server.model.device.capture.pack import frequencies_of, pack_trunk, rotary_of, rotary_tables_of
from server.model.device.step.graphs import in_parallel
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions, Tuning
from server.model.device.step.weights import DecodeShape
from server.model.seam.attention_mask import layer_windows
from server.model.seam.routing import StepRouting

LIMIT = 1e-4
"""Largest accepted distance between logits, relative to their norm; rounding alone causes about 1e-6."""
NUM_TOKENS, WINDOW, VOCABULARY, INTERMEDIATE = 5, 3, 64, 16
MOST_LAYERS = 12
EMBEDDING_SCALE = 0.02
"""Scale of the random embeddings; it is so small that a norm's epsilon changes the result."""


@torch.inference_mode()
def prove(model: Any, shape: DecodeShape, device: torch.device, tuning: Tuning | None = None) -> float:
    """The relative distance between the step's logits and those of transformers' forward.

    Args:
        model: a model that `decode_shape` accepted. Only its modules and config are read, so it may be on the meta
            device.
        shape: shape of the whole model.
        tuning: tile sizes of the step.

    Raises:
        NotCapturableError: the distance is larger than rounding, or a few layers of the model do not run alone.
    """
    kept = _one_of_each_kind(model, shape)
    excerpt, excerpt_shape = _excerpt(model, shape, kept, device)
    _check_rotary(excerpt, replace(excerpt_shape, max_tokens=shape.max_tokens))
    pages = _pages(excerpt, excerpt_shape, device)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (2, NUM_TOKENS), generator=generator).to(device)
    mask = _two_thirds(excerpt_shape)
    wanted = _reference(excerpt, excerpt_shape, tokens, mask, device)
    options = StepOptions(masked=True, tuning=tuning or Tuning())
    state = RowState(excerpt_shape, device)
    state.masks[0] = torch.tensor(mask.allowed, device=device)
    step = DecodeStep(excerpt_shape, pack_trunk(excerpt, excerpt_shape), pages, state, 2, options)
    if device.type == "cuda":
        with in_parallel():
            step.compile()
    step.rows.copy_(torch.arange(2, dtype=torch.int32))
    got = []
    for now in tokens.T:
        step.tokens.copy_(now)
        step.launch()
        got.append(step.logits.clone())
    difference = torch.stack(got, dim=1) - wanted
    distance = float((difference.norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))).nan_to_num(torch.inf).max())
    need(
        distance <= LIMIT,
        f"the captured step's logits are {distance:.2g} of their norm away from transformers' own, wanted {LIMIT}: "
        f"{type(model).__name__} computes something that the step does not",
    )
    return distance


def _one_of_each_kind(model: Any, shape: DecodeShape) -> list[int]:
    """The first and the last layer of each kind. Layers are of one kind if all their modules have the same class, the
    same settings except the layer's number, and weights of the same sizes."""
    kinds: dict[str, list[int]] = {}
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    for index, layer in enumerate(text_body(model).layers):
        seen = [str(types[index : index + 1]), str(shape.windows[index : index + 1])]
        for name, module in layer.named_modules():
            settings = {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, bool | int | float | str | None) and "idx" not in key
            }
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            sizes = [(key, tuple(tensor.shape)) for key, tensor in tensors]
            seen.append(f"{name} {type(module).__name__} {sorted(settings.items())} {sizes}")
        kinds.setdefault("\n".join(seen), []).append(index)
    kept = sorted({index for same in kinds.values() for index in (same[0], same[-1])})
    need(len(kept) <= MOST_LAYERS, f"the model has {len(kinds)} kinds of layers: too many to prove each")
    return kept


def _excerpt(model: Any, shape: DecodeShape, kept: list[int], device: torch.device) -> tuple[Any, DecodeShape]:
    """The model of the layers `kept` with random float32 weights, and its shape. Experts have no weights yet."""
    excerpt = copy.deepcopy(model)
    body, config = text_body(excerpt), excerpt.config.get_text_config()
    for owner, name in product((excerpt, excerpt.model), TOWERS):
        if getattr(owner, name, None) is not None:
            setattr(owner, name, None)
    body.layers = nn.ModuleList(body.layers[index] for index in kept)
    config.num_hidden_layers = len(kept)
    for name in ("layer_types", "layer_rope_theta"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[index] for index in kept])
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    for _, block, _ in moe_blocks(excerpt):
        for name in [name for name, _ in block.experts.named_parameters(recurse=False)]:
            delattr(block.experts, name)
    embedding = embedding_of(excerpt)
    for table in (embedding, excerpt.lm_head):
        table.weight = nn.Parameter(torch.empty(VOCABULARY, shape.hidden), requires_grad=False)
        if getattr(table, "bias", None) is not None:
            table.bias = nn.Parameter(torch.empty(VOCABULARY), requires_grad=False)
    excerpt.float().to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in [*excerpt.named_parameters(), *excerpt.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        tensor.normal_(generator=generator)
        if tensor.ndim > 1:
            tensor.mul_(EMBEDDING_SCALE if tensor is embedding.weight else tensor.shape[-1] ** -0.5)
        else:  # a router's correction must not be negative: some families give hidden experts the score 0
            tensor.mul_(0.2).abs_().add_(1.0 if "norm" in name else 0.0)
    if hasattr(embedding, "scalar_embed_scale"):  # a constant that is kept in a buffer
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)
    if name := rotary_name(excerpt):
        setattr(body, name, type(getattr(body, name))(config=config).to(device))
    for at, rotary in enumerate(getattr(body, "rotary_embs", ())):
        body.rotary_embs[at] = type(rotary)(config=rotary.config).to(device)
    excerpt.set_experts_implementation("eager")
    return excerpt.eval(), replace(
        shape,
        num_layers=len(kept),
        vocab=VOCABULARY,
        intermediate=INTERMEDIATE,
        max_rows=2,
        max_tokens=2 * NUM_TOKENS,
        attentions=tuple(shape.attention(index) for index in kept),
        windows=layer_windows(config, len(kept)),
        dense_layers=frozenset(at for at, index in enumerate(kept) if index in shape.dense_layers),
        dtype=torch.float32,
        experts=replace(shape.experts, bias=shape.experts.bias and torch.float32),
        packed=None,
    )


def _check_rotary(excerpt: Any, shape: DecodeShape) -> None:
    """Check that the step's tables of angles equal the family's rotary embedding up to the last position."""
    last = shape.max_tokens - 1
    positions = torch.tensor([[0, 1, last // 3, last // 2, last]], device=excerpt.lm_head.weight.device)
    names = frequencies_of(excerpt, shape.num_layers)
    for name, tables in dict(zip(names, rotary_tables_of(excerpt, shape), strict=True)).items():
        if not name:
            continue
        rotary, attribute = rotary_of(excerpt, name)
        rotary = copy.deepcopy(rotary)  # some kinds change with the positions that they get
        kind = [] if attribute == "inv_freq" else [attribute.removesuffix("_inv_freq")]
        given = positions.expand(3, *positions.shape) if hasattr(rotary, "mrope_section") else positions
        found = rotary(excerpt.lm_head.weight[None], given, *kind)
        found = (found.real, found.imag) if isinstance(found, Tensor) else found
        for table, own in zip(tables, found, strict=False):
            num = getattr(rotary, attribute).shape[0]
            layouts = [own[0, :, :num], own[0, :, ::2][:, :num]][: 2 if shape.neighbours else 1]
            same = any(torch.allclose(table[positions[0], :num], one.float(), atol=1e-3) for one in layouts)
            need(same, f"{type(rotary).__name__} turns by other angles than the step's table within {shape.max_tokens}")


def _pages(excerpt: Any, shape: DecodeShape, device: torch.device) -> DevicePages:
    """Pages with every expert in a slot; the model's experts become views of the same memory."""
    moe, experts, hidden = shape.num_moe_layers, shape.num_experts, shape.hidden
    sizes = PagesShape(moe, experts, shape.top_k, experts, shape.span_elements, 2, shape.dtype)
    pages = DevicePages(sizes, None, device=device)
    pages.adopt(torch.arange(experts).expand(moe, experts))
    pages.slots.normal_(0.0, hidden**-0.5, generator=torch.Generator(device).manual_seed(2))
    for (_, block, _), spans in zip(moe_blocks(excerpt), pages.slots.view(moe, experts, -1), strict=True):
        for name, values in expert_tensors(spans, shape, transposed=block.experts.is_transposed).items():
            setattr(block.experts, name, nn.Parameter(values, requires_grad=False))
    return pages


def expert_tensors(spans: Tensor, shape: DecodeShape, *, transposed: bool) -> dict[str, Tensor]:
    """The parameters of an experts module, of which plain spans [E, elements] are views."""
    inner, hidden, bias = shape.intermediate, shape.hidden, shape.experts.bias is not None
    sizes = {
        "gate_up_proj": (2 * inner, hidden), "gate_up_proj_bias": (2 * inner,),
        "down_proj": (hidden, inner), "down_proj_bias": (hidden,),
    }  # fmt: skip
    kept = {name: size for name, size in sizes.items() if bias or not name.endswith("_bias")}
    parts = torch.split(spans, [math.prod(size) for size in kept.values()], dim=1)
    found = {name: part.reshape(-1, *size) for part, (name, size) in zip(parts, kept.items(), strict=True)}
    return {name: part.mT if transposed and part.ndim == 3 else part for name, part in found.items()}


def _two_thirds(shape: DecodeShape) -> ExpertMask:
    at = torch.arange(shape.num_moe_layers)[:, None] + torch.arange(shape.num_experts)
    return ExpertMask.of((at % 3 != 0).numpy())


def _reference(excerpt: Any, shape: DecodeShape, tokens: Tensor, mask: ExpertMask, device: torch.device) -> Tensor:
    """Logits [2, T, V] of transformers' forward of tokens [2, T], its own attention masks included; the first row's
    routers choose under the mask, by the family's gating rule."""
    try:
        plain = excerpt(input_ids=tokens[1:], use_cache=False).logits
    except torch.cuda.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"a few layers of {type(excerpt).__name__} do not run alone: {error}"
        raise NotCapturableError(reason) from error
    everything = ExpertMask.same_in_every_layer(range(shape.num_experts), shape.num_moe_layers, shape.num_experts)
    routing = StepRouting(excerpt.config.get_text_config().model_type, shape.num_moe_layers, device, everything)
    for layer, (_, _, router) in enumerate(moe_blocks(excerpt)):
        routing.install(layer, router)
    routing.begin(1, tokens.shape[1], [mask])
    masked = excerpt(input_ids=tokens[:1], use_cache=False).logits
    routing.finish()
    return torch.cat([masked, plain]).float()
