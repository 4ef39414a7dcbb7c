"""The signals that can be asked for, by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Final

from agora.routing.signals import ENTROPY, P_TRUE, SELF_CONSISTENCY, VERBALISED
from graphs.signals.asking import Asking
from graphs.signals.entropy import entropy
from graphs.signals.p_true import p_true
from graphs.signals.self_consistency import self_consistency
from graphs.signals.verbalised import verbalised

SIGNALS: Final[Mapping[str, Callable[[Asking], Awaitable[float]]]] = MappingProxyType(
    {SELF_CONSISTENCY: self_consistency, VERBALISED: verbalised, P_TRUE: p_true, ENTROPY: entropy}
)
"""Each asks for one signal and gives a number, or raises `NoSignal`."""
