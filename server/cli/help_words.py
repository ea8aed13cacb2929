"""Help of typer's commands in the words of the others': STORE, FILE and N, where typer writes the types of the code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints


def in_plain_words(command: Any, function: Callable[..., None]) -> None:
    """Name the values of a command's arguments and options; `command` is what typer made of `function`.

    Arguments and text are called as the parameter is, files FILE and numbers N; switches take nothing.
    """
    types = get_type_hints(function)
    context = command.make_context(command.name, [], resilient_parsing=True)
    for parameter in command.get_params(context):
        name = parameter.name.rpartition("_")[2].upper()
        if parameter.param_type_name == "argument":
            _name_argument(parameter, name if parameter.nargs == 1 else f"{name}...")
        else:
            parameter.metavar = _word(types.get(parameter.name, bool), name)


def _name_argument(parameter: Any, word: str) -> None:
    parameter.metavar = word
    parameter.get_usage_pieces = lambda ctx: [word]
    parameter.display_type_rich = lambda ctx: None


def _word(kind: Any, name: str) -> str:
    kinds = {kind, *get_args(kind)}
    kinds |= {inner for one in kinds for inner in get_args(one)}
    if bool in kinds:
        return ""
    if Path in kinds:
        return "FILE"
    return "N" if kinds & {int, float} else name
