"""For all tests."""

import asyncio
import os

# Before torch is loaded: its threads spin for each other for less, which a busy test machine needs; see agora.cli.app.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # looptime asks the policy for its loop before plain tests too, and the policy would make one that nobody closes.
    asyncio.set_event_loop(None)
