"""What is asked of an expert about an answer of its own, to tell how far that can be trusted."""

from graphs.signals.counting import signals_of
from graphs.signals.entropy import asked_with
from graphs.signals.gathering import Gathered, gather
from graphs.signals.needs import out_of_reach
from graphs.signals.registry import SIGNALS

__all__ = ["SIGNALS", "Gathered", "asked_with", "gather", "out_of_reach", "signals_of"]
