"""The commands `calibrate` and `evaluate`, as functions that a typer application mounts.

Invariant: standard output carries the result alone, as text or, with --json, as one JSON object; progress goes to
standard error; errors are raised, for the application to print.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from expert_store.manifest import MANIFEST_NAME
from extractor.cli.options import JsonOption
from extractor.cli.progress import progress_bar
from extractor.encoding.names import MADE, ExpertsDtype
from extractor.planning.criteria import CRITERIA
from extractor.planning.plots import require_picture
from extractor.planning.sizes import parse_share
from extractor.writing.disk import require_writable
from server.errors import UsageError
from server.quality.texts import MIN_SEQUENCE_TOKENS, Half, TextOptions, TextsError, find_domains
from server.settings.values import Dtype, MemoryAmount, parse_device

if TYPE_CHECKING:
    from server.model.host.assembly import HostModel

DeviceOption = Annotated[
    str, typer.Option(parser=parse_device, metavar="DEVICE", help="auto (a GPU if any), cpu, cuda, or cuda:1.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the computation; auto is the checkpoint's.")]
SlotsOption = Annotated[
    MemoryAmount | None,
    typer.Option(
        parser=MemoryAmount.parse, metavar="SIZE", help="Memory for slots, such as 4GiB, or 25% of the store's experts."
    ),
]
HalfOption = Annotated[Half, typer.Option(help="Documents to take: even and odd ones keep two runs apart.")]
ContextOption = Annotated[int, typer.Option(metavar="N", help="Tokens of a sequence.")]
TokensOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Most tokens of a domain, rounded up to whole sequences.")
]

EncodingsOption = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help=f"Measure the experts in these too, so that `plan --budget` can choose: some of {', '.join(MADE)}.",
    ),
]
PrefixOption = Annotated[
    str,
    typer.Option(
        metavar="TEXT", help="Text before every question, such as '<|endoftext|>' where documents begin with it."
    ),
]
CriteriaOption = Annotated[
    str, typer.Option(metavar="CRITERIA", help=f"Criteria to compare, of {', '.join(CRITERIA)}.")
]
TextsOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXTS", help="Held-out text of a domain: PATH or NAME=PATH.")
]
QuestionsOption = Annotated[list[Path] | None, typer.Option(metavar="FILE", help='jsonl of "prompt" and "answer".')]
ReferenceOption = Annotated[
    str | None, typer.Option(metavar="STORE", help="Whole store or checkpoint to compare with.")
]
AdapterOption = Annotated[
    str, typer.Option(metavar="NAME", help="Adapter of the masked text: auto is the one made for the mask, or none.")
]
StatsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Statistics: compare criteria at the sizes of --keep.")
]
SharesOption = Annotated[str, typer.Option(metavar="SHARES", help="Shares of the experts to compare criteria at.")]
PlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Picture of quality over kept share (with --stats).")
]


def calibrate(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A store, or a checkpoint (a store is made of it for the time being)."),
    ],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXTS", help="A file or folder for each domain; NAME=PATH gives it a name.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Statistics file to write.")],
    half: HalfOption = "all",
    context: ContextOption = 512,
    max_tokens: TokensOption = 65536,
    price_tokens: Annotated[
        int, typer.Option("--price", metavar="N", min=0, help="Tokens of a domain to measure masks on; 0: none.")
    ] = 16384,
    encodings: EncodingsOption = "",
    weights: Annotated[bool, typer.Option(metavar="", help="Read all weights once, for the criterion aimer.")] = True,
    slots_memory: SlotsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run texts through the whole model with paged experts, and write the statistics of its experts.

    After an interruption, the same command continues. `deepfew plan` can add the statistics of several runs.
    """
    with ExitStack() as stack:
        from server.quality.calibration import CalibrationOptions
        from server.quality.calibration import calibrate as run
        from server.quality.texts import find_domains

        check_sequence(context)
        require_writable(out, "--out")
        names = _encodings(encodings, source)
        from extractor.statistics.file import write_statistics

        domains = find_domains(texts)
        options = CalibrationOptions(TextOptions(context, max_tokens, half), price_tokens, weights, names)
        model = stack.enter_context(opened_model(source, out, slots_memory, device, dtype))
        check_context(context, model)
        if not model.routing.mask.is_full:
            raise TextsError(
                f"{source} holds only a part of its checkpoint's experts, and calibration measures the demand for all: "
                "name the checkpoint, or a store of all of it"
            )
        progress = stack.enter_context(progress_bar("calibrating")).show
        encoded = partial(opened_model, source, out, slots_memory, device, dtype)
        statistics = run(model, domains, options, out.with_name(out.name + ".resume"), progress, encoded)
        write_statistics(out, statistics)
    counts = dict(zip(statistics.domains, (int(count) for count in statistics.num_tokens), strict=True))
    if as_json:
        points = {"num_price_points": len(statistics.price), "num_encoding_points": len(statistics.encodings)}
        print(json.dumps({"statistics": str(out), "num_tokens": counts, **points}))
    else:
        print(f"{out}: {sum(counts.values())} tokens of {len(counts)} domains")
        for name, count in counts.items():
            print(f"  {name}: {count} tokens")


def evaluate(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store, or a checkpoint.")],
    texts: TextsOption = None,
    questions: QuestionsOption = None,
    prefix: PrefixOption = "",
    reference: ReferenceOption = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Plan file to mask to.")] = None,
    adapter: AdapterOption = "auto",
    stats: StatsOption = None,
    keep: SharesOption = "50%,25%,12.5%",
    criteria: CriteriaOption = "reap-sum,coverage",
    seeds: Annotated[int, typer.Option(metavar="N", min=0, help="Random controls.")] = 3,
    max_tokens: TokensOption = 16384,
    half: HalfOption = "all",
    context: ContextOption = 512,
    slots_memory: SlotsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a store or a plan costs: perplexity of texts, answers to questions, deficit, efficiency."""
    with ExitStack() as stack:
        from server.quality.evaluation import EvaluationRequest
        from server.quality.evaluation import evaluate as run

        check_sequence(context)
        if not texts and not questions:
            raise TextsError("there is nothing to measure: give --texts or --questions")
        if prefix and not questions:
            raise TextsError("--prefix stands before questions: give --questions, or leave it out")
        if plot is not None:
            if stats is None:
                raise TextsError("--plot draws what --stats compares: give --stats, or leave it out")
            require_picture(plot)
            require_writable(plot, "--plot")
        names = [name.strip() for name in criteria.split(",")]
        if unknown := sorted(set(names) - set(CRITERIA)):
            raise TextsError(f"--criteria: there is no {unknown[0]!r}, wanted some of {', '.join(CRITERIA)}")
        request = EvaluationRequest(
            domains=find_domains(texts) if texts else [],
            questions=list(questions or ()),
            text=TextOptions(context, max_tokens, half),
            plan=plan,
            statistics=stats,
            shares=_shares(keep),
            criteria=names,
            seeds=range(seeds),
            prefix=prefix,
            adapter=adapter,
        )
        model = stack.enter_context(opened_model(store, None, slots_memory, device, dtype))
        check_context(context, model)
        whole = None
        if reference is not None:
            whole = stack.enter_context(opened_model(reference, None, slots_memory, device, dtype))
        progress = stack.enter_context(progress_bar("evaluating")).show
        report = run(model, whole, request, progress)
        if plot is not None:
            report.draw(plot)
    print(json.dumps(report.to_json()) if as_json else report.to_text())


def _shares(text: str) -> list[float]:
    try:
        return [parse_share(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--keep: {error}") from None


def _encodings(text: str, source: str) -> tuple[ExpertsDtype, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in MADE:
            raise UsageError(f"--encodings: there is no {name!r}, wanted some of {', '.join(MADE)}")
    if names and (Path(source) / MANIFEST_NAME).is_file():
        raise UsageError(f"--encodings makes experts of the checkpoint, and {source} is a store: name the checkpoint")
    return cast("tuple[ExpertsDtype, ...]", names)


def check_sequence(context: int) -> None:
    if context < MIN_SEQUENCE_TOKENS:
        raise TextsError(f"--context is {context}, wanted at least {MIN_SEQUENCE_TOKENS} tokens")


def check_context(context: int, model: HostModel) -> None:
    if context > model.context_tokens:
        raise TextsError(f"--context is {context}, wanted at most the model's {model.context_tokens} tokens")


@contextmanager
def opened_model(
    source: str,
    out: Path | None,
    slots_memory: MemoryAmount | None,
    device: str,
    dtype: str,
    experts_dtype: ExpertsDtype | None = None,
    adapters: bool = True,
) -> Iterator[HostModel]:
    """The model of a store; a checkpoint becomes a store first, for as long as it is needed.

    With `out`, the file that the command writes, that store is beside it and kept after an interruption, so that the
    same command does not extract it again.
    """
    import transformers

    from expert_store.store import Store
    from server.model.host.assembly import load_model, resolve_device, resolve_dtype
    from server.model.runner import RunnerOptions
    from server.serving.assembly import experts_bytes

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        path = Path(source)
        if not (path / MANIFEST_NAME).is_file():
            path = stack.enter_context(_extracted(source, out, experts_dtype))
        opened = Store.open(path)
        opened.begin_trunk_check()  # before the config is used
        model = load_model(
            opened,
            RunnerOptions(
                device=resolve_device(device),
                dtype=resolve_dtype(dtype, opened),
                slots_memory_bytes=None if slots_memory is None else slots_memory.resolve(experts_bytes(opened)),
                adapters=adapters,
            ),
        )
        stack.callback(model.close)
        yield model


@contextmanager
def _extracted(source: str, out: Path | None, experts_dtype: ExpertsDtype | None) -> Iterator[Path]:
    from extractor.checkpoint.checkpoint import resolve_checkpoint
    from extractor.planning.selection import SelectionRequest
    from extractor.writing.prepare import prepare

    checkpoint = resolve_checkpoint(source)
    with ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deepfew-store-")))
        else:
            made = "" if experts_dtype is None else f"-{experts_dtype}"
            folder = out.with_name(f"{out.name}.store-{checkpoint.fingerprint[:12]}{made}")
            folder.parent.mkdir(parents=True, exist_ok=True)
        work = prepare(checkpoint, folder, SelectionRequest(), experts_dtype)
        work.check_disk()
        with progress_bar("extracting", work.remaining_bytes) as bar:
            work.run(bar.advance)
        yield folder
    if out is not None:
        shutil.rmtree(folder)
