"""`deepfew generate STORE "prompt"`: continue a prompt in this process, streaming to the terminal."""

from __future__ import annotations

import argparse
import json
import queue
import sys
import typing
import uuid
from collections.abc import Sequence
from typing import Any

from server.cli.flags import Parser, add_settings_flags, settings_from
from server.cli.logging_setup import configure_logging
from server.cli.main import UsageError
from server.engine.request import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    Masking,
    OnMissing,
    SamplingParams,
)
from server.model.load_progress import LoadProgress
from server.serving.deficit import deficit_details
from server.serving.loading import check_store, load
from server.serving.service import LoadedModel


def main(argv: Sequence[str]) -> int:
    """Generate once; returns the exit status. A prompt of `-` is read from standard input."""
    arguments = _parser().parse_args(argv)
    settings = settings_from(arguments).settings
    configure_logging(settings.log.log_format, "error")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt:
        raise UsageError('the prompt is empty; write it after the store: deepfew generate STORE "The capital of"')
    sampling = _sampling(arguments)
    _require("--router-temperature", arguments.router_temperature, 0.01, 100)
    check_store(settings)
    model = load(settings, LoadProgress(on_change=_say) if sys.stderr.isatty() else LoadProgress())
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    try:
        ids = _encode(model, prompt, chat=arguments.chat)
        request = GenerationRequest(
            uuid.uuid4().hex,
            tuple(ids),
            sampling,
            masking=_masking(arguments, model, len(ids)),
            on_missing=arguments.on_missing,
            router_temperature=arguments.router_temperature,
        )
        return _generate(model, request, as_json=arguments.json)
    finally:
        model.engine.stop(0.0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="deepfew generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("store", metavar="STORE", help="directory of the store")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from standard input")
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to generate (default 100)")
    group.add_argument("--temperature", type=float, metavar="T", help="divides the logits; sampling, else greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens up to this mass")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 repeats less")
    group.add_argument("--seed", type=int, metavar="SEED", help="the same seed gives the same text")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end after this; may be repeated")
    group = parser.add_argument_group("experts of this prompt")
    group.add_argument("--profile", metavar="NAME", help="mask to this plan of --profiles")
    group.add_argument("--pool", type=_pool, metavar="N", help="experts of every layer, or a share such as 25%%")
    group.add_argument(
        "--on-missing",
        choices=typing.get_args(OnMissing),
        default="mask",
        help="where an expert is not available: do without (default), read it from the checkpoint, or fail",
    )
    group.add_argument(
        "--router-temperature", type=float, default=1.0, metavar="T", help="divides the routers' logits (default 1)"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, and nothing else")
    add_settings_flags(parser, sections=("model", "engine", "masks", "log"), store=False)
    return parser


def _pool(text: str) -> int | float:
    """A number of experts, or a share in percent; `RequestMasks` has the bounds."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of experts and no share such as 25%") from None


def _masking(arguments: argparse.Namespace, model: LoadedModel, num_prompt_tokens: int) -> Masking | None:
    assert model.masks is not None, "a store on disk always offers masks"
    may_fetch = arguments.on_missing == "fetch"
    return model.masks.masking(num_prompt_tokens, profile=arguments.profile, pool=arguments.pool, may_fetch=may_fetch)


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    _require("--max-new-tokens", arguments.max_new_tokens, 1, 2**31 - 1)
    _require("--temperature", arguments.temperature, 1e-4, 1000)
    _require("--top-k", arguments.top_k, 1, 2**31 - 1)
    _require("--top-p", arguments.top_p, 1e-9, 1)
    _require("--repetition-penalty", arguments.repetition_penalty, 0.01, 100)
    _require("--seed", arguments.seed, 0, 2**64 - 1)
    if "" in arguments.stop:
        raise UsageError("--stop is empty; give the text to stop at")
    return SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )


def _require(flag: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # also refuses NaN
        raise UsageError(f"{flag} is {value}; wanted: from {least} to {most}")


def _encode(model: LoadedModel, prompt: str, *, chat: bool) -> list[int]:
    if not chat:
        return [int(token) for token in model.tokenizer(prompt)["input_ids"]]
    if not getattr(model.tokenizer, "chat_template", None):
        raise UsageError("the checkpoint has no chat template; leave out --chat")
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return [int(token) for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def _generate(model: LoadedModel, request: GenerationRequest, *, as_json: bool) -> int:
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
    return 0


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


def _say(progress: LoadProgress) -> None:
    sys.stderr.write(f"\r\x1b[K{progress.phase} {progress.share:.0%}")
    sys.stderr.flush()
