"""The commands `adapt`, `attach` and `detach`, as functions that a typer application mounts.

Invariant: standard output carries the result alone; forecast, progress and figures meanwhile go to standard error;
errors are raised, for the application to print.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expert_store.manifest import MANIFEST_NAME
from extractor.cli.options import JsonOption
from extractor.cli.progress import progress_bar
from extractor.planning.sizes import format_size, parse_share
from extractor.writing.disk import require_writable
from server.cli.quality import (
    ContextOption,
    DeviceOption,
    HalfOption,
    SlotsOption,
    TokensOption,
    check_context,
    check_sequence,
    opened_model,
)
from server.errors import UsageError
from server.quality.texts import TextOptions, find_domains
from server.settings.values import Dtype

if TYPE_CHECKING:
    from expert_store.adapter import Adapter
    from server.adapting.store import TrainedStore
    from server.adapting.target import Target
    from server.model.host.assembly import HostModel

POOLS = "12.5%:100%"
DeepExperts = Sequence[tuple[int, ...]]
"""The experts of each deep expert, by layer."""
SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A store of all experts, or a checkpoint (a store is made of it).")
]
OutOption = Annotated[
    Path, typer.Option(metavar="PATH", help="File to write, such as pools.safetensors; with --experts, a new store.")
]
ExpertsOption = Annotated[
    bool, typer.Option("--experts", help="Train the experts of --plan too; they become a new store.")
]
TextsOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXTS", help="Text of a domain to train on: PATH or NAME=PATH.")
]
PlanOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Train for the mask of this plan alone: the strongest repair.")
]
PoolsOption = Annotated[
    str | None, typer.Option(metavar="LOW:HIGH", help=f"Train for any mask of these shares of the experts ({POOLS}).")
]
TrainedOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Tokens to train on; the text is read again when it ends.")
]
GeneratedOption = Annotated[
    int, typer.Option(metavar="N", min=0, help="Tokens of text that the whole model writes, to train on too.")
]
RankOption = Annotated[
    int, typer.Option(metavar="N", min=0, help="Of the changes of linear layers; 0 changes whole matrices.")
]
SharedOption = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=1 << 16, help="Width of an expert that each layer gets for all masked tokens; 0: none."
    ),
]
RateOption = Annotated[float, typer.Option(metavar="RATE", min=1e-6, max=1.0, help="Highest rate of learning.")]
BatchOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Tokens of a step; by default so many that 300 steps are made.")
]
SeedOption = Annotated[int, typer.Option(metavar="N", min=0, max=(1 << 32) - 1, help="Of all random choices.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Of the computation; auto is float32 on a CPU, else the checkpoint's.")
]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A store.")]


def adapt(
    source: SourceArgument,
    out: OutOption,
    texts: TextsOption = None,
    plan: PlanOption = None,
    experts: ExpertsOption = False,
    pools: PoolsOption = None,
    tokens: TrainedOption = 4_000_000,
    self_generated: GeneratedOption = 0,
    rank: RankOption = 32,
    shared_width: SharedOption = 64,
    rate: RateOption = 3e-3,
    batch_tokens: BatchOption = None,
    seed: SeedOption = 0,
    max_tokens: TokensOption = 1 << 20,
    half: HalfOption = "all",
    context: ContextOption = 512,
    slots_memory: SlotsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a small adapter of the trunk, with which rows that are masked answer almost as the whole model does.

    The whole model teaches itself under masks; experts stay as they are, bit for bit, unless --experts makes a new
    store of those of a plan. After an interruption, the same command continues. `deepfew attach` puts the adapter into
    a store.
    """
    with ExitStack() as stack:
        from server.adapting.run import AdaptRequest, remove
        from server.adapting.run import adapt as train
        from server.adapting.training import TrainingOptions, usual_batch
        from server.model.host.assembly import resolve_device

        check_sequence(context)
        require_writable(out / MANIFEST_NAME if experts else out, "--out")
        _check(plan, experts, pools, has_text=bool(texts or self_generated))
        domains = find_domains(texts) if texts else []
        is_cpu = resolve_device(device).type == "cpu"
        chosen: Dtype = "float32" if dtype == "auto" and is_cpu else dtype
        model = stack.enter_context(opened_model(source, out, slots_memory, device, chosen, adapters=False))
        check_context(context, model)
        if not model.routing.mask.is_full:
            raise UsageError(
                f"{source} holds only a part of its checkpoint's experts, and the whole model is the teacher: name the "
                "checkpoint, or a store of all of it"
            )
        options = TextOptions(context, max_tokens, half)
        training = TrainingOptions(tokens, batch_tokens or usual_batch(tokens), rate, seed)
        deep_experts = [] if plan is None else _planned(plan, model)
        target = _target(plan, deep_experts, pools, model.store.manifest.model.num_experts)
        request = AdaptRequest(domains, options, target, training, rank, self_generated, shared_width, experts)
        folder = out.with_name(out.name + ".resume")
        progress = stack.enter_context(progress_bar("adapting")).show
        store = _new_store(plan, deep_experts, out, model) if experts and plan is not None else None
        adapter, changes = train(model, request, folder, _say, progress)
        if store is None:
            adapter.write(out)
        else:
            store.write(adapter, changes, tokens)
        remove(folder)
    trained = [adapter.num_parameters, *(one.numel() for parts in changes.values() for one in parts.values())]
    _tell(out, adapter, sum(trained), as_json)


def _check(plan: Path | None, experts: bool, pools: str | None, *, has_text: bool) -> None:
    if experts and plan is None:
        raise UsageError("--experts trains the experts of a plan: give --plan")
    if plan is not None and pools is not None:
        raise UsageError("--plan and --pools contradict each other: give one of them")
    if not has_text:
        raise UsageError("there is nothing to train on: give --texts, or --self-generated")


def attach(
    store: StoreArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A file of `deepfew adapt`.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Its name; by default the file's.")] = None,
) -> None:
    """Put an adapter into a store. A server uses it from its next start on, for requests whose masks it was made for.

    It replaces an adapter of the same name. Requests without a mask never see an adapter.
    """
    from expert_store.adapter import Adapter
    from expert_store.adapter import attach as put

    called = adapter.stem if name is None else name
    put(store, called, Adapter.read(adapter))
    print(f"{store} has the adapter {called}")


def detach(
    store: StoreArgument, name: Annotated[str, typer.Argument(metavar="NAME", help="Of an adapter of the store.")]
) -> None:
    """Remove an adapter from a store."""
    from expert_store.adapter import detach as take

    take(store, name)
    print(f"{store} has no adapter {name} any more")


def _tell(out: Path, adapter: Adapter, num_parameters: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"adapter": str(out), "num_parameters": num_parameters, **adapter.training}))
    else:
        print(f"{out}: {num_parameters:,} numbers; held-out perplexity ÷ the whole model's")
        for share in adapter.ratios:
            print(f"  {float(share):.1%} of the experts: {adapter.told_ratio(share)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _planned(plan: Path, model: HostModel) -> DeepExperts:
    """The deep experts of a plan that was made for this model."""
    from extractor.planning.plan import read_plan
    from extractor.planning.selection import SelectionRequest, select

    manifest, request = model.store.manifest, SelectionRequest(plan=read_plan(plan))
    return select(request, manifest.model, manifest.layers, 0, manifest.source.fingerprint).deep_experts


def _new_store(plan: Path, deep_experts: DeepExperts, out: Path, model: HostModel) -> TrainedStore:
    """The store that the trained experts of a plan become; says so."""
    from server.adapting.store import TrainedStore
    from server.model.seam.changed import experts_modules

    manifest = model.store.manifest
    transposed = bool(experts_modules(model.model)[0].is_transposed)
    store = TrainedStore(model.store, out, deep_experts, transposed=transposed)
    dtype = store.layers[0].tensors[0].dtype
    encoded = "" if manifest.layers == store.layers else f", in {dtype} instead of their encoding"
    _say(
        f"{out} becomes a new store of the {len(deep_experts)} deep experts of {plan}, {format_size(store.total_bytes)}"
        f"{encoded}: its experts are no longer those of the checkpoint. {model.store.path} stays as it is"
    )
    return store


def _target(plan: Path | None, deep_experts: DeepExperts, pools: str | None, num_experts: int) -> Target:
    import numpy as np

    from extractor.planning.planner import allowed_by
    from router.mask import ExpertMask
    from server.adapting.target import Target

    if plan is not None:
        mask = ExpertMask(allowed_by(np.array(deep_experts), num_experts))
        if mask.is_full:
            raise UsageError(f"{plan} has every expert, so there is nothing to repair: plan fewer, with --keep")
        return Target(mask=mask)
    low, _, high = (pools or POOLS).partition(":")
    try:
        shares = parse_share(low), parse_share(high or low)
    except ValueError as error:
        raise UsageError(f"--pools: {error}") from None
    if not shares[0] <= shares[1] or shares[0] >= 0.999:
        raise UsageError(f"--pools is {pools}, wanted two shares, the smaller one first and below 100%")
    return Target(shares=shares)
