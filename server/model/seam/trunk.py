"""Loads the trunk with transformers, without any memory for the experts.

A subclass of the model class removes the parameters of every experts module right after the constructor (on the meta
device); `from_pretrained` then reads only the trunk's tensors. Source: `transformers/modeling_utils.py`,
`integrations/moe.py`. A checkpoint's own code is never run. Invariant: a trunk loaded within `trunk_is_checked` is
served only if every file of it has the hash in the manifest. Linear layers that a
trunk holds in 8 bits are dequantised here; `eight_bits` gives their codes to those who multiply them as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from expert_store.rows import scale_factors
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.conversion import model_names
from extractor.checkpoint.quantised import QuantisedEntry, read_part
from extractor.checkpoint.text_model import read_config, text_model
from server.errors import ServerError
from server.model.seam.experts import IMPLEMENTATION
from server.model.seam.rows import attention_implementation

Arguments = ParamSpec("Arguments")
Loaded = TypeVar("Loaded")
SCALES_KEY = r"(weight_scale(_inv)?|\.scale|qscale_weight)$"
"""Tensors beside the weights of linear layers in 8 bits, which transformers has no place for."""
LOADING_BAR = "Loading weights"  # the name of transformers' progress bar over the tensors


class TrunkError(ServerError):
    """The trunk of a store cannot be loaded: its config and its tensors do not fit together."""


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module is one whose forward goes through transformers' registry of experts implementations."""
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")


def load_trunk(
    path: Path, *, device: torch.device, dtype: torch.dtype, progress: Callable[[float], None] = lambda share: None
) -> PreTrainedModel:
    """Load the model at `path` without its experts' parameters.

    Args:
        path: directory in the Hugging Face layout that holds the trunk's tensors.
        device, dtype: device and dtype of the trunk.
        progress: called after each tensor with the share of loaded tensors.

    Returns:
        The model in eval mode; its experts modules use our implementation.

    Raises:
        TrunkError: tensors of the trunk are missing.
    """
    model_class, config = _model_of(path)
    with _reported(progress):
        loaded: Any = _without_experts(model_class).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map=None,
            experts_implementation=IMPLEMENTATION,
            attn_implementation=attention_implementation(model_class),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            local_files_only=True,
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise TrunkError(
            f"{path} lacks {len(missing)} tensors that {model_class.__name__} needs, the first {missing[0]}: "
            "extract into an empty directory with this release of transformers, or take a checkpoint that has them"
        )
    trunk: PreTrainedModel = model.to(device).eval()
    _dequantise(trunk, path)
    return trunk


@torch.no_grad()
def _dequantise(model: PreTrainedModel, path: Path) -> None:
    """Gives the linear layers that the trunk holds in 8 bits their values; transformers has read their codes."""
    for linear, entry in _encoded_linears(model, path):
        linear.weight.copy_(read_part(entry))


def eight_bits(model: PreTrainedModel, path: Path) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
    """The linear layers of a model of `load_trunk` that the trunk at `path` holds in 8 bits: E4M3 codes [O, N] and fp32
    scales [O, groups of columns], on the host."""
    found = {}
    for linear, entry in _encoded_linears(model, path):
        encoding = entry.encoding
        fields = encoding.numbers({role: read_part(part) for role, part in encoding.parts.items()})
        found[linear] = fields.codes.view(torch.float8_e4m3fn), scale_factors(encoding.rows, fields)
    return found


def _encoded_linears(model: PreTrainedModel, path: Path) -> Iterator[tuple[nn.Linear, QuantisedEntry]]:
    entries = Checkpoint.open(path).tensors
    encoded = {name: entry for name, entry in entries.items() if isinstance(entry, QuantisedEntry)}
    for name, target in model_names(model, encoded).items() if encoded else ():
        linear = model.get_submodule(target.removesuffix(".weight"))
        assert isinstance(linear, nn.Linear), f"{target} is no linear layer, and extraction keeps only those in 8 bits"
        yield linear, encoded[name]


def trunk_is_checked(
    load: Callable[Concatenate[Store, Arguments], Loaded],
) -> Callable[Concatenate[Store, Arguments], Loaded]:
    """Run `load` while other threads compare the files of the store's trunk with the manifest.

    For a damaged file, raise ShardCorruptError at the next progress report of `load`, or at its end. That error
    replaces an error of `load`.
    """

    @wraps(load)
    def checked(store: Store, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Loaded:
        with store.checking_trunk() as check:
            tell: Any = kwargs.get("progress")

            def report(phase: str, share: float) -> None:
                check.poll()  # fail for damaged weights before all experts are read
                if tell is not None:
                    tell(phase, share)

            kwargs["progress"] = report
            return load(store, *args, **kwargs)

    return checked


def trunk_skeleton(path: Path) -> PreTrainedModel:
    """The model of `load_trunk` on the meta device: float32 modules and shapes without memory. Raises TrunkError."""
    model_class, config = _model_of(path)
    with torch.device("meta"):
        return _without_experts(model_class)(config)


def context_tokens(path: Path) -> int:
    """The context length of the model at `path` in tokens, from its config alone; 2^20 if the config sets no bound."""
    _, config = _model_of(path)
    return int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)


def _model_of(path: Path) -> tuple[type[PreTrainedModel], Any]:
    """The class for text generation for the config at `path`, and the part of the config that it takes."""
    config = read_config(path)
    found = text_model(config)
    if found is None:
        raise TrunkError(f"transformers has no causal language model for {type(config).__name__}")
    return found


@contextmanager
def _reported(progress: Callable[[float], None]) -> Iterator[None]:
    """Hide transformers' progress bar over the trunk's tensors and report its share to `progress` instead."""

    def watched(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") != LOADING_BAR or not arguments:
            return factory(*arguments, **options)
        return _counted(arguments[0], progress)

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hook = transformers_logging.set_tqdm_hook(watched)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _counted(tensors: Collection[Any], progress: Callable[[float], None]) -> Iterator[Any]:
    for number, tensor in enumerate(tensors):
        yield tensor
        progress((number + 1) / len(tensors))


def _without_experts(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass that removes the parameters of experts modules; it keeps name and module, which transformers reads."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        for block in self.modules():
            for experts in [child for child in block.children() if is_experts_module(child)]:
                for name in [name for name, _ in experts.named_parameters(recurse=False)]:
                    delattr(experts, name)
                experts._is_hf_initialized = True
                block._is_hf_initialized = True  # some families initialise the experts' weights from their block

    unexpected = [*(model_class._keys_to_ignore_on_load_unexpected or ()), SCALES_KEY]
    members = {
        "__init__": __init__, "__module__": model_class.__module__, "_keys_to_ignore_on_load_unexpected": unexpected
    }  # fmt: skip
    stripped = type(model_class.__name__, (model_class,), members)
    assert hasattr(importlib.import_module(model_class.__module__), model_class.__name__)
    return stripped
