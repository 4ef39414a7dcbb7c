"""For all tests."""

import asyncio
import os
import signal

# Before torch is loaded: its threads spin for each other for less, which a busy test machine needs; see agora.cli.app.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
from hypothesis import settings

# How long an example takes depends on what else the machine does; tests that hang are ended by pytest's own timeout.
settings.register_profile("agora", deadline=None)
settings.load_profile("agora")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that runs the tests in its background makes them ignore Ctrl-C, and with them all programs they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # looptime asks the policy for its loop before plain tests too, and the policy would make one that nobody closes.
    asyncio.set_event_loop(None)
