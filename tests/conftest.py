"""For all tests."""

import asyncio

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # looptime asks the policy for its loop before plain tests too, and the policy would make one that nobody closes.
    asyncio.set_event_loop(None)
