"""The command line, `agora`. See `agora.cli.app` for the commands and `agora.cli.invocation` for the exit codes."""

from agora.cli.app import main

__all__ = ["main"]
