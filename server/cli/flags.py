"""Flags from settings: every key of `Settings` becomes an option of the commands that use them."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path
from typing import Any, NoReturn

from server.cli.main import UsageError
from server.settings.load import Leaf, Resolved, leaves, load_settings


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would put all flags in front of it."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}; `{self.prog} --help` says more")


def add_settings_flags(parser: argparse.ArgumentParser, *, sections: tuple[str, ...], store: bool = True) -> None:
    """Add a flag for each key of `sections`, and the store as a positional argument."""
    if store:
        parser.add_argument("store", nargs="?", metavar="STORE", help="directory of the store")
    for section in sections:
        group = parser.add_argument_group(section)
        for leaf in leaves():
            if leaf.path.startswith(section + "."):
                group.add_argument(leaf.flag, dest=leaf.name, **_shape(leaf))
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file (TOML), also DEEPFEW_CONFIG")


def settings_from(arguments: argparse.Namespace) -> Resolved:
    """Settings where the flags in `arguments` come first.

    Raises:
        SettingsError: see `load_settings`.
    """
    names = {leaf.name for leaf in leaves()}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return load_settings(flags, config=arguments.config)


def _shape(leaf: Leaf) -> dict[str, Any]:
    default = leaf.info.default
    text = (leaf.info.description or "").replace("%", "%%")
    if default is not None:
        text += f" (default {default})"
    if leaf.info.annotation is bool:
        return {"help": text, "action": argparse.BooleanOptionalAction, "default": None}
    if typing.get_origin(leaf.info.annotation) is typing.Literal:
        return {"help": text, "choices": typing.get_args(leaf.info.annotation)}
    return {"help": text, "metavar": leaf.name.rpartition("_")[2].upper()}
