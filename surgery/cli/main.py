"""The command: a table of lazily loaded sub-commands, global options, and how errors end a process."""

import atexit
import gc
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from surgery import __version__
from surgery.cli import output
from surgery.cli.table import COMMANDS, GROUPS, Commands
from surgery.errors import SurgeryError, UsageError, closest

_WIDE = {"max_content_width": 110}
_EPILOG = "Start with: surgery demo.  Every command explains itself: surgery graft --help."


def _read_plainly(params: list[Any]) -> list[Any]:
    """Let plain values of options be read without pydantic, which Typer imports for the first one (0.2 s a start).
    Whatever is not plain, wrong values included, goes the long way."""
    for param in params:
        slow = getattr(param, "get_runtime_param", None)
        if slow is not None and "get_runtime_param" not in vars(param):
            param.get_runtime_param = partial(_Plain, slow)
    return params


class _Plain:
    """Stands where Typer keeps the object that turns text into values."""

    def __init__(self, slow: Any) -> None:
        self._slow = slow

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        kind, info = param.type_descriptor.annotation, param.type_descriptor.parameter_info
        if value is None:
            return () if getattr(param, "multiple", False) or param.nargs == -1 else None
        if kind is str and isinstance(value, str) and info.parser is None:
            return value
        if kind is float and isinstance(value, float) and info.min is None and info.max is None:
            return value  # a default; text goes the long way
        if kind == list[str] and isinstance(value, tuple | list) and all(isinstance(v, str) for v in value):
            return list(value)
        if kind in (Path, list[Path]) and not (info.exists or info.resolve_path or info.writable):
            if kind is Path and isinstance(value, str | Path):
                return Path(value)
            if kind == list[Path] and isinstance(value, tuple | list):
                return [Path(v) for v in value]
        if kind is int and (isinstance(value, int) or (isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value))):
            number = int(value)
            if (info.min is None or number >= info.min) and (info.max is None or number <= info.max):
                return number
        return self._slow().coerce(value, param=param, ctx=ctx)


class _PlainCommand(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _read_plainly(super().get_params(ctx))


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are called, not when help is shown."""

    table: Commands = {}

    def get_params(self, ctx: Any) -> list[Any]:
        return _read_plainly(super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table) + ([*GROUPS, *_plugins()] if self.table is COMMANDS else [])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self.table is COMMANDS and cmd_name in GROUPS:
            return _group(cmd_name, *GROUPS[cmd_name])
        if cmd_name not in self.table:
            found = _plugins().get(cmd_name) if self.table is COMMANDS else None
            return _load(cmd_name, f"op:{cmd_name}", found) if found else None
        first, second = self.table[cmd_name]
        return _group(cmd_name, first, second) if isinstance(second, Mapping) else _load(cmd_name, first, second)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            path = ctx.command_path
            raise UsageError(
                "unknown-command", f"no command '{args[0]}' in {path}", hint=closest(args[0], self.list_commands(ctx))
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, _summary(entry)) for name, entry in self.table.items()]
        if self.table is COMMANDS:
            rows += [(name, _summary(entry)) for name, entry in GROUPS.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        if self.table is COMMANDS and (plugins := _plugins()):
            with formatter.section("Plug-ins"):
                formatter.write_dl(list(plugins.items()))


def _plugins() -> dict[str, str]:
    """Operations that other packages bring, with a line on each; names of ours are not theirs to take."""
    from surgery.graph.plugins import plugin_ops

    return {name: f"Of {point.origin}." for name, point in plugin_ops().items() if name not in {*COMMANDS, *GROUPS}}


class _RootGroup(LazyGroup):
    table = COMMANDS


def _summary(entry: tuple[str, Any]) -> str:
    """The line of a command or group in the list of commands."""
    if isinstance(entry[1], Mapping):
        return f"{entry[0].splitlines()[0]} ({', '.join(entry[1])})"
    return entry[1]


def _help(text: str) -> str:
    """The docstring with its examples kept as they are: paragraphs that hold a command line are not rewrapped."""
    from inspect import cleandoc

    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if "  surgery " in p or p.startswith("surgery ") else p for p in paragraphs)


def _group(name: str, summary: str, members: Commands) -> Any:
    kind = type("Group", (LazyGroup,), {"table": members})
    app = typer.Typer(cls=kind, help=_help(summary), no_args_is_help=True, add_completion=False, rich_markup_mode=None)
    app.callback()(lambda: None)
    command = typer.main.get_group(app)
    command.name = name
    return command


def _needs_words(function: Any) -> bool:
    from inspect import Parameter, signature

    return any(p.default is Parameter.empty for p in signature(function).parameters.values())


def _load(name: str, target: str, summary: str) -> Any:
    if target.startswith("op:"):
        from surgery.cli.operation import command_function

        function = command_function(target.removeprefix("op:"), summary)
    else:
        from surgery.graph.op import load_attribute

        function = load_attribute(target)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(
        name=name,
        cls=_PlainCommand,
        help=_help(function.__doc__ or summary),
        no_args_is_help=_needs_words(function),
        context_settings=_WIDE,
    )(function)
    command = typer.main.get_command(app)
    command.name = name
    return command


app = typer.Typer(
    cls=_RootGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=_EPILOG,
)


def _version(value: bool) -> None:
    if value:
        output.data(f"surgery {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Edit pretrained checkpoints: graft operators, train, evaluate, and know afterwards what was done.

    Example:  surgery graft --replace attn=hyena dit-digits --data digits -o out/hyena
    """
    if debug:
        os.environ["SURGERY_DEBUG"] = "1"


class _Terminated(BaseException):
    """SIGTERM, as an exception so that locks and temporary files are cleared."""


def _heed_signals() -> None:
    """Make SIGTERM an exception too, and lose neither it nor Ctrl-C: one that falls into a destructor or a callback is
    printed and dropped by Python, and the run would go on to its end."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    def unraisable(lost: Any) -> None:
        if lost.exc_type not in (KeyboardInterrupt, _Terminated):
            sys.__unraisablehook__(lost)
            return
        again = signal.SIGTERM if lost.exc_type is _Terminated else signal.SIGINT
        signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(again))
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = unraisable


def _leave_cycles() -> None:
    """Spare the interpreter its last search for cycles, 0.4 s after torch: the process ends and nothing is freed by it.
    Triton's bindings take what is not freed for a leak and say so."""
    if "triton" not in sys.modules:
        gc.freeze()


def main() -> None:
    """Run the command line; the exit status is that of the error's class."""
    _heed_signals()
    atexit.register(_leave_cycles)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Paths go out as the bytes they are; what the encoding of the terminal lacks goes out escaped.
        plain = sys.stdout.encoding.lower() in ("utf-8", "utf8")
        sys.stdout.reconfigure(errors="surrogateescape" if plain else "backslashreplace")
    try:
        status = app(standalone_mode=False, prog_name="surgery")
        if status == 130:  # the option parser caught the interrupt and says so by this number
            _interrupted()
        output.leave(status if isinstance(status, int) else 0)
    except SurgeryError as err:
        if os.environ.get("SURGERY_DEBUG"):
            raise
        output.error(err)
        output.leave(err.status)
    except BrokenPipeError:
        output.leave(141)
    except (KeyboardInterrupt, _Terminated) as err:
        _interrupted()
        output.leave(130 if isinstance(err, KeyboardInterrupt) else 143)
    except Exception as err:
        _foreign(err)


def _interrupted() -> None:
    command = shlex.join(a for a in sys.argv[1:] if a != "--resume")
    again = f" To go on: surgery {command} --resume" if _resumable(sys.argv[1:]) else ""
    output.warn(f"interrupted; the output is not there, and nothing that was there has changed.{again}")


def _resumable(words: list[str]) -> bool:
    """Whether the command that `words` name has --resume: recipes, and all that are made from an operation."""
    table: Commands = {**COMMANDS, **GROUPS}
    for word in words:
        first, second = table.get(word, ("", ""))
        if isinstance(second, Mapping):
            table = second
        elif not word.startswith("-"):
            own = first.startswith("op:") or first in ("surgery.cli.graph.recipe:run", "surgery.cli.merge:merge")
            return own or (not first and word in _plugins())
    return False


def _foreign(err: Exception) -> None:
    """Errors of the option parser, and faults of ours."""
    if os.environ.get("SURGERY_DEBUG"):
        raise err
    code = getattr(err, "exit_code", None)
    if type(err).__name__ == "Abort":
        _interrupted()
        output.leave(130)
    if code is not None:
        if type(err).__name__ not in ("Exit", "NoArgsIsHelpError"):
            context = getattr(err, "ctx", None)
            where = (
                f"surgery {context.command_path.removeprefix('surgery').strip()} --help".replace("  ", " ")
                if context
                else "--help"
            )
            message = err.format_message() if hasattr(err, "format_message") else str(err)
            output.error(UsageError("option", message.rstrip("."), hint=f"see {where}"))
        elif type(err).__name__ == "NoArgsIsHelpError":
            output.note(err.format_message() if hasattr(err, "format_message") else str(err))
        output.leave(code)
    if isinstance(err, MemoryError):
        from surgery.errors import ResourceError

        output.error(
            ResourceError("memory", "not enough memory for this work", hint="use fewer --workers or smaller batches")
        )
        output.leave(5)
    output.error(
        SurgeryError(
            "internal",
            f"{type(err).__name__}: {err}",
            hint="this is a fault of ours; run again with SURGERY_DEBUG=1 and report it",
        )
    )
    output.leave(1)
