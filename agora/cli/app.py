"""The command line: its commands, and the one place where their errors end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Final

import typer

from agora.cli import ask, calibrate, demo, doctor, experts, fed, init, keys, models, runs, serve
from agora.cli.invocation import ExitCode, Invocation, of, quieten
from agora.cli.streams import OutputError, discard, flush, guarded
from agora.errors import AgoraError

EPILOG = (
    "Exit codes: 0 done; 1 an error; 2 wrong usage; 3 an answer with parts missing; 70 a bug in agora; "
    "130 stopped by Ctrl-C."
)

SPIN_COUNT: Final = "10000"
"""How long the threads of one torch operation spin for each other before they sleep. By default for milliseconds: where
another program holds a core that one of them needs, every operation then takes a whole time slice. Thirty times less
costs nothing on a free machine and makes a disturbed decoding step 8 times faster (228 against 1940 ms)."""

app = typer.Typer(
    name="agora",
    help="Expert language models that reason together: ask one question, many experts answer its parts.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
app.command("ask")(ask.ask)
app.command("serve")(serve.serve)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(experts.app, name="experts")
app.add_typer(models.app, name="models")
app.add_typer(runs.app, name="runs")
app.add_typer(keys.app, name="keys")
app.add_typer(fed.app, name="fed")
app.command("init")(init.init)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the log, and tracebacks of errors. Also AGORA_DEBUG=1.")
    ] = False,
) -> None:
    if debug:
        of(context).set_debug()
    if version:
        of(context).say(f"agora {metadata.version('agora-llm')}")
        raise typer.Exit(ExitCode.OK)
    if context.invoked_subcommand is None:
        of(context).say(context.get_help().rstrip())
        raise typer.Exit(ExitCode.USAGE)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line.

    Returns:
        The exit code; nothing is raised.
    """
    # Commands set this from their own option; until one is reached, wrong usage is told in the form asked for.
    invocation = Invocation(json="--json" in arguments)
    if os.environ.get("AGORA_DEBUG", "0") not in ("", "0"):
        invocation.set_debug()
    if sys.stdout is None:
        # Before anything is asked, which may cost money: nobody could read what comes of it.
        invocation.tell_output(OutputError("standard output is closed"), "send it to a file, or to /dev/null")
        return ExitCode.ERROR
    with guarded():
        try:
            return _run(invocation, arguments)
        except BrokenPipeError:
            # The reader (`| head`) has seen enough. What is left in the buffers must not fail again at exit.
            discard(sys.stdout, sys.stderr)
            return ExitCode.OK
        except OutputError as e:
            invocation.tell_output(e)
            discard(sys.stdout)
            return ExitCode.ERROR


def _run(invocation: Invocation, arguments: Sequence[str]) -> int:
    try:
        code = app(args=list(arguments), prog_name="agora", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
    except AgoraError as e:
        invocation.tell_error(e)
        return ExitCode.ERROR
    except typer.TyperException as e:
        invocation.tell_usage(e)
        return ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort):
        invocation.tell_interrupted()
        return ExitCode.INTERRUPTED
    except (BrokenPipeError, OutputError):
        raise
    except Exception as e:
        invocation.tell_bug(e)
        return ExitCode.BUG
    if code == ExitCode.INTERRUPTED:
        # Typer ends an interrupted command as one that returned so.
        invocation.tell_interrupted()
    return code if isinstance(code, int) else ExitCode.OK


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point `agora`.

    Args:
        arguments: The command line without the program's name; that of the process if None.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets an escape for it, not a crash.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    quieten()
    # Before torch is loaded, which reads it then.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    code = run(sys.argv[1:] if arguments is None else arguments)
    if code == ExitCode.INTERRUPTED:
        # Everything that had to be written is. An ordinary exit would wait for threads that are loading weights.
        flush()
        os._exit(code)
    sys.exit(code)
