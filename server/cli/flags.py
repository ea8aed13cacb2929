"""Flags from settings: every key of `Settings` becomes an option of the commands that use them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from server.settings.load import Leaf, leaves, load_settings
from server.settings.schema import Settings

SECTIONS = tuple(name for name in Settings.model_fields if name != "store")


def with_settings(*sections: str, store_required: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a typer function an option for each key of `sections`, and the store as its first argument.

    The function takes `resolved`, the `Resolved` settings in which those options come first, and its own parameters
    beside it. `load_settings` says what is raised.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(function, eval_str=True).parameters
        annotations: dict[str, Any] = {"store": _store_argument(store_required)}
        annotations |= {name: parameter.annotation for name, parameter in own.items() if name != "resolved"}
        chosen = [leaf for leaf in leaves() if leaf.path.partition(".")[0] in sections]
        annotations |= {leaf.name: _option(leaf) for leaf in chosen}
        annotations["config"] = Annotated[
            Path | None, typer.Option(metavar="FILE", help="settings file (TOML), also DEEPFEW_CONFIG")
        ]
        defaults = dict.fromkeys([*(leaf.name for leaf in chosen), "config"])
        defaults |= {name: parameter.default for name, parameter in own.items()}
        defaults["store"] = inspect.Parameter.empty if store_required else None

        @wraps(function)
        def command(**values: Any) -> Any:
            config = values.pop("config")
            flags = {name: values.pop(name) for name in ["store", *(leaf.name for leaf in chosen)]}
            return function(load_settings(flags, config=config), **values)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(name, keyword, default=defaults[name], annotation=kind)
            for name, kind in annotations.items()
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = annotations
        return command

    return decorate


def _store_argument(required: bool) -> Any:
    return Annotated[str if required else str | None, typer.Argument(metavar="STORE", help="directory of the store")]


def _option(leaf: Leaf) -> Any:
    """The annotation of a key's option; settings validate the text, so that a mistake is said with the key's path."""
    kind: Any = str
    metavar: str | None
    flag, metavar = leaf.flag, leaf.name.rpartition("_")[2].upper()
    if leaf.info.annotation is bool:
        kind, flag, metavar = bool, f"{flag}/--no-{flag.removeprefix('--')}", ""
    elif typing.get_origin(leaf.info.annotation) is typing.Literal:
        kind, metavar = leaf.info.annotation, None
    default = "" if leaf.info.default is None else f" (default {leaf.info.default})"
    panel = leaf.path.partition(".")[0]
    return Annotated[
        kind | None,
        typer.Option(
            flag,
            metavar=metavar,
            help=(leaf.info.description or "") + default,
            show_default=False,
            rich_help_panel=panel,
        ),
    ]
