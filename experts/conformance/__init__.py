"""The suite that every backend passes. Run it on yours by giving it one:

    import pytest
    from experts.conformance import BackendConformance

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        async def backend(self):
            backend = MyBackend(...)
            yield backend
            await backend.aclose()

It needs `pytest` and `pytest-asyncio`. What the backend does not claim is skipped, and the skip names the capability.
The tests hold for any model, an untrained one too: they compare a backend's answers with its own other answers, never
with what a clever model would say. Class attributes adapt them to slow machines and to inexact arithmetic.
"""

from __future__ import annotations

try:
    import pytest
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
        "experts.conformance is a test suite and needs pytest: pip install pytest pytest-asyncio"
    ) from e

# Before the modules are imported: it is what makes a failed assertion show its values.
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in ("base", "answers", "likelihood", "life")))

from experts.conformance.answers import Answers  # noqa: E402
from experts.conformance.life import Life  # noqa: E402
from experts.conformance.likelihood import Likelihood  # noqa: E402

__all__ = ["BackendConformance"]


class BackendConformance(Answers, Likelihood, Life):
    """Subclass it and give it a fixture `backend`; add a fixture `adapter` if the backend has one.

    The class attributes of `experts.conformance.base.Bench` adapt it.
    """
