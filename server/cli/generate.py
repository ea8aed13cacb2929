"""`deepfew generate STORE "prompt"`: continue a prompt in this process, streaming to the terminal."""

from __future__ import annotations

import json
import queue
import sys
import uuid
from typing import Annotated, Any

import typer

from extractor.cli.options import JsonOption
from extractor.cli.progress import progress_bar
from extractor.planning.sizes import parse_share
from server.cli.flags import with_settings
from server.engine.request import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    OnMissing,
    SamplingParams,
)
from server.errors import UsageError
from server.model.load_progress import LoadProgress
from server.serving.deficit import deficit_details
from server.serving.loading import check_store, load
from server.serving.logging_setup import configure_logging
from server.serving.service import LoadedModel
from server.settings.load import Resolved


def _pool(text: str) -> int | float:
    """A number of experts, or a share of them in percent; `Masks` has the bounds."""
    try:
        return parse_share(text) if text.endswith("%") else int(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no number of experts and no share such as 25%") from None


def _number(help: str, panel: str = "sampling") -> Any:
    return typer.Option(metavar="N", help=help, rich_help_panel=panel)


EXPERTS_PANEL = "experts of this prompt"
StopOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End after this; may be repeated.", rich_help_panel="sampling"),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Mask to this plan of --profiles.", rich_help_panel=EXPERTS_PANEL),
]
PoolOption = Annotated[
    Any,
    typer.Option(
        parser=_pool,
        metavar="N",
        help="Experts of every layer, or a share such as 25%.",
        rich_help_panel=EXPERTS_PANEL,
    ),
]
AdapterOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Adapter of the masked tokens: auto is the one made for the mask, none is none.",
        rich_help_panel=EXPERTS_PANEL,
    ),
]
OnMissingOption = Annotated[
    OnMissing,
    typer.Option(
        help="Where an expert is not available: do without, read it from the checkpoint, or fail.",
        rich_help_panel=EXPERTS_PANEL,
    ),
]


@with_settings("model", "engine", "masks", "log", store_required=True)
def generate(
    resolved: Resolved,
    *,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, _number("Tokens to generate.")] = 100,
    temperature: Annotated[float | None, _number("Divides the logits; sampling, else greedy.")] = None,
    top_k: Annotated[int | None, _number("Sample from this many of the most likely tokens.")] = None,
    top_p: Annotated[float | None, _number("Sample from the most likely tokens up to this mass.")] = None,
    repetition_penalty: Annotated[float | None, _number("Above 1 repeats less.")] = None,
    seed: Annotated[int | None, _number("The same seed gives the same text.")] = None,
    stop: StopOption = None,
    profile: ProfileOption = None,
    pool: PoolOption = None,
    adapter: AdapterOption = "auto",
    on_missing: OnMissingOption = "mask",
    router_temperature: Annotated[float, _number("Divides the routers' logits.", EXPERTS_PANEL)] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", metavar="", help="Use the checkpoint's chat template.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt in this process, streaming to the terminal."""
    settings = resolved.settings
    configure_logging(settings.log.log_format, "error")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError('the prompt is empty; write it after the store: deepfew generate STORE "The capital of"')
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if not 0.01 <= router_temperature <= 100:
        raise UsageError(f"--router-temperature is {router_temperature}; wanted: from 0.01 to 100")
    check_store(settings)
    with progress_bar("loading") as bar:
        model = load(
            settings, LoadProgress(on_change=lambda progress: bar.show(str(progress.phase), progress.share, 1.0))
        )
    try:
        ids = _encode(model, text, chat=chat)
        assert model.masks is not None, "a store on disk always offers masks"
        masking = model.masks.masking(len(ids), profile=profile, pool=pool, may_fetch=on_missing == "fetch")
        request = GenerationRequest(
            uuid.uuid4().hex,
            tuple(ids),
            sampling,
            masking=masking,
            adapter=adapter,
            on_missing=on_missing,
            router_temperature=router_temperature,
        )
        _generate(model, request, as_json=as_json)
    finally:
        model.engine.stop(0.0)


def _encode(model: LoadedModel, prompt: str, *, chat: bool) -> list[int]:
    if not chat:
        return [int(token) for token in model.tokenizer(prompt)["input_ids"]]
    if not getattr(model.tokenizer, "chat_template", None):
        raise UsageError("the checkpoint has no chat template; leave out --chat")
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return [int(token) for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def _generate(model: LoadedModel, request: GenerationRequest, *, as_json: bool) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    model.engine.submit(request, events.put)
    while True:
        event = events.get()
        if isinstance(event, FailedEvent):
            raise event.error
        if isinstance(event, FinishedEvent):
            break
        if not as_json:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    print(json.dumps(_summary(event, model, request), ensure_ascii=False) if as_json else "")


def _summary(end: FinishedEvent, model: LoadedModel, request: GenerationRequest) -> dict[str, Any]:
    seconds = end.timing.decode_seconds
    return {
        "generated_text": end.generated_text,
        "finish_reason": end.reason,
        "prompt_tokens": end.num_prompt_tokens,
        "generated_tokens": end.num_generated_tokens,
        "seed": end.seed,
        "deficit": deficit_details(end.deficit, model, request).model_dump(),
        "ttft_seconds": round(end.timing.ttft_seconds, 4),
        "tokens_per_second": round((end.num_generated_tokens - 1) / seconds, 2) if seconds > 0 else None,
    }
