"""`deepfew fit`: whether a model fits this machine or another one, where its bytes go, and the speed to expect.

Invariant: no weights are read; standard output carries the result alone, as tables or, with --json, as one JSON object.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from extractor.cli.options import ExpertsDtypeOption, JsonOption, TrunkDtypeOption
from extractor.planning.sizes import format_size, parse_size
from server.cli.quality import DeviceOption, DtypeOption, SlotsOption
from server.errors import UsageError
from server.settings.load import cache_directory
from server.settings.schema import EngineSettings

if TYPE_CHECKING:
    from server.fit.facts import ModelFacts
    from server.fit.prediction import Change, Prediction
    from server.machine.rates import MachineRates

ENGINE = EngineSettings()
"""The defaults of serving."""


def parse_rate(text: str) -> int:
    """Parse a rate such as `50GB/s` or `3.2TB/s` to bytes a second.

    Raises:
        ValueError: not a rate.
    """
    return parse_size(re.sub(r"\s*/\s*s\s*$", "", text))


def _size(text: str) -> Any:
    return typer.Option(parser=parse_size, metavar="SIZE", help=text)


def _rate(text: str) -> Any:
    return typer.Option(parser=parse_rate, metavar="RATE", help=text, rich_help_panel="Figures of another machine")


SourceArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT|STORE", help="Checkpoint, store, or name on the hub (owner/name).")
]
ContextOption = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="Tokens of a row, as serve --max-context-tokens.")
]
BatchOption = Annotated[
    int, typer.Option(metavar="N", min=1, max=1024, help="Rows decoded together, as serve --max-batch-size.")
]
PromptOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Tokens of the prompt, behind which decoding goes on.")
]
MachineOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="Rates of another machine: h100, or a file that a probe wrote."),
]
ProbeOption = Annotated[bool, typer.Option("--probe", metavar="", help="Measure this machine anew.")]


def fit(
    source: SourceArgument,
    device_memory: Annotated[int | None, _size("Free memory of the GPU, such as 24GiB.")] = None,
    host_memory: Annotated[int | None, _size("Host memory for the process.")] = None,
    context: ContextOption = None,
    batch: BatchOption = ENGINE.max_batch_size,
    experts_dtype: ExpertsDtypeOption = None,
    trunk_dtype: TrunkDtypeOption = None,
    dtype: DtypeOption = "auto",
    slots_memory: SlotsOption = None,
    kv_memory: Annotated[int | None, _size("Memory for keys and values, such as 4GiB.")] = None,
    prompt: PromptOption = 512,
    device: DeviceOption = "auto",
    stats: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Statistics of calibrate, for the hit rates.")
    ] = None,
    probe: ProbeOption = False,
    machine: MachineOption = None,
    device_bandwidth: Annotated[int | None, _rate("Reading the device's memory, such as 3.2TB/s.")] = None,
    copy_rate: Annotated[int | None, _rate("Copying from host memory to the device, such as 53GB/s.")] = None,
    disk_rate: Annotated[int | None, _rate("Reading the disk, such as 3GB/s.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Say whether a model fits, where its bytes go, its speed, and what would help most. Reads headers alone.

    The rates of this machine are measured once and kept. The exit status is 1 if the model does not fit.
    """
    from server.fit.facts import facts_of
    from server.fit.placement import Wish
    from server.fit.prediction import changes, predict
    from server.model.kv_memory import context_bounds

    rates, told = _rates(source, device, machine, probe, device_memory is not None)
    rates = replace(
        rates,
        read_rate=device_bandwidth or rates.read_rate,
        expert_rate=device_bandwidth or rates.expert_rate,
        copy_rate=copy_rate or rates.copy_rate,
        disk_rate=disk_rate or rates.disk_rate,
    )
    if rates.kind == "cpu" and device_memory is not None:
        raise UsageError("--device-memory is that of a GPU, and a CPU computes: leave it out, or set --machine h100")
    with facts_of(source, experts_dtype, dtype, stats, trunk_dtype) as model:
        most, least = context_bounds(context, model.max_context)
        wish = Wish(
            gpu=rates.kind == "gpu",
            device_memory=rates.device_memory if device_memory is None else device_memory,
            host_memory=rates.host_memory if host_memory is None else host_memory,
            context=most,
            least_context=least,
            rows=batch,
            slots_memory=None if slots_memory is None else slots_memory.resolve(model.experts_bytes),
            kv_memory=kv_memory,
        )
        chunk = ENGINE.prefill_chunk_tokens
        now = predict(model, rates, wish, prompt, chunk)
        better = changes(model, rates, now, chunk)
        if as_json:
            print(json.dumps(_document(model, rates, told, now, better)))
        else:
            _print(model, rates, told, now, better)
    return 0 if now.placement.problem is None else 1


def _rates(source: str, device: str, machine: str | None, probe: bool, wants_gpu: bool) -> tuple[MachineRates, str]:
    """The rates to predict with, and in words where they come from."""
    from server.machine.rates import known_machines, read_rates

    known = known_machines()
    if machine is not None:
        if machine in known:
            return known[machine], f"those of {machine}, as this project measured it"
        if not Path(machine).is_file():
            raise UsageError(f"--machine {machine} is neither a file nor one of {', '.join(known)}")
        return read_rates(Path(machine)), f"from {machine}"
    import torch

    if not torch.cuda.is_available() and (wants_gpu or device.startswith("cuda")):
        return known["h100"], "those of h100, since no GPU is here; other cards by --device-bandwidth and --copy-rate"
    from server.model.host.assembly import resolve_device

    return _own_rates(source, resolve_device(device), probe)


def _own_rates(source: str, device: Any, probe: bool) -> tuple[MachineRates, str]:
    """This machine's rates, kept or measured now."""
    from server.machine import probe as measuring
    from server.machine.rates import read_rates, write_rates

    path = cache_directory() / f"machine-{str(device).replace(':', '-')}.json"
    if path.is_file() and not probe:
        return measuring.with_free_memory(read_rates(path), device), f"this machine's, from {path}"
    Console(stderr=True).print("measuring this machine, once; what else runs makes it look slower …")
    rates = measuring.probe(device, measuring.weights_of(Path(source)))
    write_rates(path, rates)
    return rates, f"this machine's, measured now and kept in {path}"


def _document(
    model: ModelFacts, rates: MachineRates, told: str, now: Prediction, better: list[Change]
) -> dict[str, Any]:
    return {
        "model": {
            "name": model.name, "layers": model.num_layers, "moe_layers": len(model.layers),
            "experts": model.num_experts, "available": model.num_available, "top_k": model.top_k,
            "encoding": model.encoding, "experts_bytes": model.experts_bytes, "span_bytes": model.span_bytes,
        },
        "rates": asdict(rates) | {"from": told},
        "hit_rates_from": model.demand.source,
        **_figures(now),
        "changes": [{"change": one.change, **_figures(one.after)} for one in better],
    }  # fmt: skip


def _figures(one: Prediction) -> dict[str, Any]:
    return {
        "fits": one.placement.problem is None,
        "placement": asdict(one.placement),
        "wish": asdict(one.wish),
        "hit_rate": one.hit_rate,
        "tokens_per_second": one.tokens_per_second,
        "batch_tokens_per_second": one.rows_tokens_per_second,
        "step_seconds": asdict(one.step),
        "batch_step_seconds": asdict(one.rows_step),
        "prompt_tokens": one.prompt_tokens,
        "ttft_seconds": one.ttft_seconds,
    }


def _print(model: ModelFacts, rates: MachineRates, told: str, now: Prediction, better: list[Change]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    placed, wish = now.placement, now.wish
    if placed.problem is None:
        console.print(f"{model.name} fits: {_path(placed.path, placed.reason)}")
    else:
        console.print(f"[bold red]{model.name} does not fit:[/] {placed.problem}")
    console.print(f"rates: {told}\nhit rates: {model.demand.source}")
    console.print(_places(model, now))
    if placed.problem is None:
        alone, together, first = _speeds(now)
        console.print(
            f"one request {alone}, {wish.rows} together {together}; first token of a prompt of "
            f"{now.prompt_tokens} after {first}"
        )
        step = ", ".join(f"{part} {_number(1e3 * value)}" for part, value in asdict(now.step).items() if value)
        console.print(f"a step of one row takes {_number(1e3 * now.step.total)} ms: {step}")
    if better:
        table = Table("what would help", "one request", "together", "first token", box=None, pad_edge=False)
        for one in better:
            table.add_row(one.change, *_speeds(one.after))
        console.print(table)


def _speeds(one: Prediction) -> tuple[str, str, str]:
    """Tokens a second alone and together, and the time to the first token."""
    alone, together = _number(one.tokens_per_second), _number(one.rows_tokens_per_second)
    return f"{alone} tokens/s", f"{together} tokens/s", f"{_number(one.ttft_seconds)} s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"


def _path(path: str, reason: str) -> str:
    if path == "captured":
        return "captured decoding on the GPU"
    return "the host drives its experts" + (f", since {reason}" if reason else "")


def _places(model: ModelFacts, now: Prediction) -> Table:
    placed, wish = now.placement, now.wish
    here = "device" if wish.gpu else "memory"
    share = placed.slots / model.num_available
    of_all = len(model.layers) * model.num_available
    table = Table("part", "place", "bytes", "", box=None, pad_edge=False)
    held = str(model.dtype).removeprefix("torch.")
    if model.eight_bits and placed.path == "captured":
        held += f"; a step reads {format_size(placed.step_bytes)}, linear layers in FP8 as they are"
    table.add_row("trunk", here, format_size(placed.trunk_bytes), held)
    table.add_row("KV memory", here, format_size(placed.kv_bytes), f"{placed.kv_tokens:,} tokens of {wish.rows} rows")
    table.add_row(
        "slots", here, format_size(placed.slots_bytes + placed.beside_slots),
        f"{placed.slots} of {model.num_available} experts a layer ({share:.0%}), {model.encoding}, hit rate "
        f"{now.hit_rate:.2f}",
    )  # fmt: skip
    table.add_row("to compute in", here, format_size(placed.reserve_bytes), "")
    if placed.host_bytes:
        name = "host tier" if wish.gpu else "page cache"
        table.add_row("experts", name, format_size(placed.host_bytes), f"{placed.host_experts} of {of_all}")
    if placed.disk_bytes:
        table.add_row("experts", "disk", format_size(placed.disk_bytes), "")
    return table
