"""Chooses the decode path, once at the start: the device drives the experts in captured graphs, or the host does.

Both paths have one interface (`runner.Runner`) and, up to rounding, the same results. Invariant: an option without
effect on the chosen path is an error that names the option.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
from dataclasses import replace

import torch

from expert_store.residency.pinned import NotPinnableError
from expert_store.store import Store
from server.errors import ServerError
from server.model.host.assembly import load_model
from server.model.host.kv_budget import kv_rows
from server.model.host.sequence_runner import make_runner
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.load_progress import Progress
from server.model.runner import DecodePath, Runner, RunnerOptions

log = logging.getLogger(__name__)

UNPINNABLE_SHARE = 0.25
"""The host tier's size, as a share of the experts' bytes, after the host refused to page-lock all of them."""


class DecodePathError(ServerError):
    """The settings ask for a decode path that this model, device or memory does not allow."""


def load_runner(
    store: Store,
    options: RunnerOptions,
    *,
    progress: Progress = lambda phase, share: None,
) -> Runner:
    """Load the runner of a store; logs the chosen path in one line, with the reason if it is the slower one.

    Raises:
        DecodePathError: the settings need the device-driven path, and it is not possible.
        SlotsError: memory for slots, or for experts on the host, does not suffice; the message names values that do.
        StoreError, TrunkError, MaskError: see `load_model`.
    """
    if options.path == "host":
        return _host_runner(store, options, "it was asked for", progress)
    reason = _why_not(options.device, options.path)
    host_options = options
    if reason is None:
        from server.model.device.capture import NotCapturableError
        from server.model.device.running.assembly import load_device_runner

        try:
            runner: Runner = load_device_runner(store, options, progress=progress)
            log.info("decoding on the device-driven path: captured graphs of up to %d rows", options.max_rows)
            return runner
        except (NotCapturableError, NotPinnableError) as error:
            reason = str(error)
            if isinstance(error, NotPinnableError):
                host_options = replace(options, host_memory_bytes=_share_of_experts(store, UNPINNABLE_SHARE))
    if options.path == "device":
        raise DecodePathError(f"decode_path is device, and that is not possible: {reason}. Set auto or host")
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return _host_runner(store, host_options, reason, progress)


def _host_runner(
    store: Store,
    options: RunnerOptions,
    reason: str,
    progress: Progress,
) -> Runner:
    if options.resident_bias != 0.0:
        raise DecodePathError(
            f"resident_bias is {options.resident_bias}, which only the device-driven path does, and the host drives "
            f"the experts here: {reason}. Set resident_bias to 0"
        )
    model = load_model(store, options, progress=progress)
    tier = model.cache.host_tier
    held = (
        "" if tier is None else f"; {tier.capacity_bytes} bytes of page-locked host memory stand between disk and slots"
    )
    expected = options.path == "host" or options.device.type == "cpu"
    log.log(logging.INFO if expected else logging.WARNING, "decoding on the host-driven path: %s%s", reason, held)
    try:
        kv, balance = kv_rows(model, options)
    except BaseException:
        model.close()
        raise
    max_tokens = min(options.max_tokens, kv.pool.num_blocks * BLOCK_TOKENS)
    log.info("KV memory of %d tokens, at most %d a request", kv.pool.num_blocks * BLOCK_TOKENS, max_tokens)
    return make_runner(model, max_rows=options.max_rows, max_tokens=max_tokens, kv=kv, balance=balance)


def _why_not(device: torch.device, path: DecodePath) -> str | None:
    """The reason why the kernels cannot run on this machine; None if they can. Triton's interpreter runs them on a CPU,
    slowly, if the settings ask for the device-driven path."""
    if device.type != "cuda" and path == "auto":
        return f"captured graphs need a CUDA device, and the model runs on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        from triton import knobs

        if not knobs.runtime.interpret:
            return f"captured graphs need a CUDA device, and the model runs on {device.type}"
    return None


def _share_of_experts(store: Store, share: float) -> int:
    sizes = [spec.span_bytes for spec in store.manifest.layers]
    return int(share * sum(int(row.sum()) * size for row, size in zip(store.available, sizes, strict=True)))
