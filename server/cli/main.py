"""The `deepfew` command: its subcommands and where they live; errors that we know become one line and status 2.

Invariant: nothing heavy is imported before the subcommand is known, so `deepfew --help` answers at once. torch and
transformers are imported only by the commands that use them.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from server.settings.openmp import spin_briefly

COMMANDS = {  # name: (module with `main(arguments)`, or else with a typer function of that name; what it does)
    "extract": ("extractor.cli.extract", "slice a checkpoint into a store of deep experts"),
    "inspect": ("extractor.cli.extract", "say what a store holds"),
    "verify": ("extractor.cli.extract", "check a store's files, and its bits against the checkpoint"),
    "calibrate": ("server.cli.quality", "see which experts texts want, and what they are worth"),
    "plan": ("extractor.cli.plan", "choose from that which experts a store should have"),
    "evaluate": ("server.cli.quality", "measure what serving a part of the experts costs"),
    "grow": ("server.cli.growth", "add the deep experts that were wanted and missing"),
    "shrink": ("server.cli.growth", "give up the deep experts that were wanted least"),
    "serve": ("server.cli.serve", "serve a store over HTTP"),
    "generate": ("server.cli.generate", "continue a prompt without a server"),
    "config": ("server.cli.config", "show every setting, its value and where it came from"),
}
TITLES = {
    "A store": ("extract", "inspect", "verify"),
    "The right few": ("calibrate", "plan", "evaluate", "grow", "shrink"),
    "Text from it": ("serve", "generate", "config"),
}


class UsageError(Exception):
    """The command line cannot be carried out as it stands; the message says what to change."""


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("deepfew")
    except PackageNotFoundError:
        return "0+unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0 done, 1 an unexpected failure, 2 something to put right."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"deepfew {package_version()}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `deepfew {near[0]}`?" if near else ""
        return _complain(f"there is no command {name!r}.{hint} `deepfew --help` lists all.")
    spin_briefly()
    try:
        module = importlib.import_module(COMMANDS[name][0])
        if not hasattr(module, "main"):
            return _run_typer(getattr(module, name), name, arguments[1:])
        return int(module.main(arguments[1:]) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = None  # the reader of our output is gone; the interpreter must not flush into it
        return 141
    except Exception as error:
        if is_domain_error(error):
            from extractor.errors import message_of

            return _complain(message_of(error))
        raise


def _run_typer(function: Callable[..., None], name: str, arguments: list[str]) -> int:
    """Run a command that is a typer function of its own name, as the extractor's are."""
    import typer

    from server.cli.help_words import in_plain_words

    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command(name)(function)
    command = typer.main.get_command(application)
    in_plain_words(command, function)
    try:
        command(arguments, prog_name=f"deepfew {name}")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def is_domain_error(error: BaseException) -> bool:
    """Whether the error's text was written for the user: ours, by its base class, whichever package raised it."""
    ours = ("expert_store.", "router.", "extractor.", "server.")
    if any(kind.__module__.startswith(ours) for kind in type(error).__mro__):
        return True
    return isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError))


def _complain(message: str) -> int:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(message, style="default"))
    return 2


def _overview() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = []
    for title, names in TITLES.items():
        lines += [f"{title}:", *(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names), ""]
    return "\n".join(
        [
            "usage: deepfew [--version] COMMAND …",
            "",
            "The right few experts, fully deep: serve a Mixture-of-Experts model from less memory than it needs.",
            "",
            *lines,
            "To begin with, where CHECKPOINT is a directory of safetensors, or a model of the hub:",
            "  deepfew extract CHECKPOINT STORE",
            '  deepfew generate STORE "The capital of France is"',
            "  deepfew serve STORE",
            "",
            "`deepfew COMMAND --help` says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
