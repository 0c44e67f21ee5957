"""`weft COMMAND …`: the command line. Each command is imported when it is called, so that help starts at once."""

import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from weft import __version__
from weft.launch.errors import StoppedError, UserError, WeftError, show

_COMMANDS = {
    "train": "weft.launch.train_command:train_command",
    "topology": "weft.launch.topology_command:topology_command",
    "schedule": "weft.launch.schedule_command:schedule_command",
    "plan": "weft.launch.plan_command:plan_command",
    "memory": "weft.launch.memory_command:memory_command",
    "calibrate": "weft.launch.calibrate_command:calibrate_command",
    "checkpoint": "weft.launch.checkpoint_command:checkpoint_command",
    "verify": "weft.launch.verify_command:verify_command",
    "convert": "weft.launch.convert_command:convert_command",
    "generate": "weft.launch.generate_command:generate_command",
    "serve": "weft.launch.serve_command:serve_command",
    "evaluate": "weft.launch.evaluate_command:evaluate_command",
    "inspect": "weft.launch.inspect_command:inspect_command",
}


class LazyGroup(click.Group):
    """Commands named by `package.module:function`, imported on first use."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example:  weft train configs/demo.yaml train.steps=100",
)
@click.version_option(__version__, "--version", prog_name="weft")
@click.option("--debug", is_flag=True, help="Show the traceback of every failure.")
def weft(debug: bool) -> None:
    """Train language models over tensor, pipeline and data parallel ranks."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `weft` and exit: 0 when done, 2 for what was asked wrongly, 1 for what failed on the way."""
    status = run(sys.argv[1:] if arguments is None else arguments)
    gc.freeze()  # else the interpreter searches all that is imported for garbage before it ends
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run `weft` with these arguments; every failure becomes one sentence on stderr and the exit status."""
    try:
        status = weft.main(list(arguments), prog_name="weft", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if arguments[:1] == ["--debug"]:
            traceback.print_exc()
        failure = _as_sentence(error)
        show(failure)
        return failure.exit_status


def _as_sentence(error: BaseException) -> WeftError:
    if isinstance(error, WeftError):
        return error
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return UserError(error.format_message())
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "weft"
        return UserError(f"{error.format_message().rstrip('.')}; {command} -h explains.")
    if isinstance(error, click.ClickException):
        return UserError(error.format_message())
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return StoppedError(signal.SIGINT, clean=True)
    words = " ".join(str(error).split())
    return WeftError(f"weft failed unexpectedly: {type(error).__name__}: {words}; weft --debug … shows where.")
