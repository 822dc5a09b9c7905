"""The command line: one command, one module."""

from __future__ import annotations

import io
import signal
import sys

import typer

from neo import __version__
from neo.cli import bench, compare, doctor, listings, profile, serve, show, simulate, trace, validate
from neo.core.errors import InputError, NeoError, one_line

app = typer.Typer(
    name="neo",
    help="LLM serving for GPUs with too little memory, and the laboratory for its scheduling.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("simulate")(simulate.simulate)
app.command("compare")(compare.compare)
app.command("serve")(serve.serve)
app.command("bench")(bench.bench)
app.command("profile")(profile.profile)
app.command("validate")(validate.validate)
app.command("show")(show.show)
app.command("doctor")(doctor.doctor)
app.command("policies")(listings.policies)
app.command("hardware")(listings.hardware)
app.command("models")(listings.models)
app.add_typer(trace.app, name="trace")


def _version(value: bool) -> None:
    if value:
        print(f"neo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point: errors meant for people become one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a table is worth more than its dashes
    terminated = []

    def terminate(_number: int, _frame: object) -> None:
        terminated.append(True)
        raise KeyboardInterrupt("terminated")  # which leaves partial results, as Ctrl-C does

    signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except NeoError as error:
        sys.exit(fail(error))
    except (KeyboardInterrupt, SystemExit) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else error.code
        sys.exit(143 if terminated and code == 130 else code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        sys.exit(
            fail(InputError(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"))
        )


def fail(error: NeoError) -> int:
    """Print an error in one line; the exit code for it."""
    print(f"error: {one_line(str(error))}", file=sys.stderr)
    return 2
