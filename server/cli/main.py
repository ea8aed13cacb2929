"""The `deepfew` command: its subcommands, their modules, and the only code that prints an error.

Invariant: only the given subcommand is imported, so `deepfew --help` works without torch. An error that a user can
correct is one line on standard error with the exit status 2; any other is a bug, and keeps its traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from server.errors import message_of
from server.settings.openmp import spin_briefly
from server.settings.version import package_version


class Command(NamedTuple):
    """A subcommand: the module that has a function of its name, a line of help, and whether a second run continues."""

    module: str
    panel: str
    help: str
    continues: bool = False


STORE, CHOICE, TEXT, MACHINE = "A store", "The right few", "Text from it", "This machine"
COMMANDS = {
    "extract": Command("extractor.cli.extract", STORE, "Slice a checkpoint into a store of deep experts.", True),
    "inspect": Command("extractor.cli.extract", STORE, "Show what a store holds."),
    "verify": Command("extractor.cli.extract", STORE, "Check a store's files, and its bits against the checkpoint."),
    "calibrate": Command(
        "server.cli.quality", CHOICE, "Measure the demand of texts for experts, and the worth of each expert.", True
    ),
    "plan": Command("extractor.cli.plan", CHOICE, "Choose from that which experts a store should have."),
    "evaluate": Command("server.cli.quality", CHOICE, "Measure what serving a part of the experts costs."),
    "adapt": Command("server.cli.adapting", CHOICE, "Train a small adapter, so that fewer experts cost less.", True),
    "attach": Command("server.cli.adapting", CHOICE, "Put an adapter into a store, for its masked requests."),
    "detach": Command("server.cli.adapting", CHOICE, "Remove an adapter from a store."),
    "grow": Command("server.cli.growth", CHOICE, "Add the deep experts that were wanted and missing.", True),
    "shrink": Command("server.cli.growth", CHOICE, "Remove the deep experts that were wanted least."),
    "export": Command("extractor.cli.export", CHOICE, "Write a pruned checkpoint from a store."),
    "serve": Command("server.cli.serve", TEXT, "Serve a store over HTTP."),
    "cluster": Command("server.cli.cluster", TEXT, "Serve a store from several replicas, on Ray Serve."),
    "generate": Command("server.cli.generate", TEXT, "Continue a prompt without a server."),
    "chat": Command("server.cli.chat", TEXT, "Chat in the terminal, with a store or a running server."),
    "config": Command("server.cli.config", TEXT, "Show every setting, its value and where it came from."),
    "fit": Command("server.cli.fit", MACHINE, "Say whether a model fits, where its bytes go, and its speed."),
    "doctor": Command("server.cli.doctor", MACHINE, "Say what of this machine is wrong for serving."),
}
DESCRIPTION = "Serve a Mixture-of-Experts model from less memory than it needs: the right few experts, fully deep."
FIRST_STEPS = (
    "To begin, where CHECKPOINT is a directory of safetensors, or a model of the hub:",
    "deepfew extract CHECKPOINT STORE",
    'deepfew generate STORE "The capital of France is"',
    "deepfew serve STORE",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit status: 0 done, 2 an error of the user, 130 interrupted, 141 pipe closed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in ([], ["help"]):
        arguments = ["--help"]
    spin_briefly()
    name = next((word for word in arguments if not word.startswith("-")), "")
    status = run(_application(name), arguments, "deepfew")
    if status == 130:
        continues = name in COMMANDS and COMMANDS[name].continues
        print(
            "interrupted" + ("; the same command continues where this one stopped" if continues else ""),
            file=sys.stderr,
        )
    return status


def run(application: typer.Typer, arguments: Sequence[str], name: str) -> int:
    """Run a typer application; return the exit status. Prints the message of an error that a user can correct."""
    command = typer.main.get_command(application)
    try:
        return int(command.main(list(arguments), prog_name=name, standalone_mode=False) or 0)
    except SystemExit:  # typer's answer to a closed pipe
        return 141
    except typer.TyperException as error:
        return _print_error(_usage_message(error))
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        return _print_error(message)


def _application(chosen: str) -> typer.Typer:
    """All commands by name and help; only the function of the `chosen` one is imported."""
    application = typer.Typer(
        add_completion=False,
        help=DESCRIPTION,
        epilog="\n\n".join(FIRST_STEPS),
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    application.callback(invoke_without_command=True)(_root)
    for name, command in COMMANDS.items():
        function: Callable[..., Any] = _root
        if name == chosen:
            function = getattr(importlib.import_module(command.module), name)
        application.command(name, short_help=command.help, help=function.__doc__, rich_help_panel=command.panel)(
            function
        )
    return application


def _root(
    show_version: Annotated[bool, typer.Option("--version", metavar="", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        print(f"deepfew {package_version()}")
        raise typer.Exit


def _usage_message(error: typer.TyperException) -> str:
    """Typer's message on one line, with the command whose help describes the usage."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; `{'deepfew' if context is None else context.command_path} --help` says more"


def _print_error(message: str) -> int:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(message, style="default"))
    return 2


if __name__ == "__main__":
    sys.exit(main())
