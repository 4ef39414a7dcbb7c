"""Who is expected to be busy when: a machine's slots over time, with gaps in which a task may be put."""

from __future__ import annotations

from bisect import insort

from agora.scheduling.problem import Machine


class Timeline:
    """What one machine is expected to do from now on.

    Args:
        machine: The machine.
    """

    __slots__ = ("_busy", "_machine")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._busy: list[tuple[float, float]] = []

    def add(self, start: float, end: float) -> None:
        """Takes a slot for that long."""
        insort(self._busy, (start, end))

    def earliest(self, there_at: float, work: float) -> tuple[float, float]:
        """When a task would start and end that is put into the first gap that it fits into.

        How fast it is depends on how many others run when it starts.

        Args:
            there_at: When it could start.
            work: Its units of work.
        """
        ends = sorted(end for _, end in self._busy if end > there_at)
        for start in (there_at, *ends):
            beside = sum(1 for s, e in self._busy if s <= start < e)
            if beside >= self._machine.slots:
                continue
            end = start + work * self._machine.speed.seconds(beside + 1)
            if self._fits(start, end):
                return start, end
        raise AssertionError("after the last end every slot is free")

    def _fits(self, start: float, end: float) -> bool:
        during = [(s, e) for s, e in self._busy if s < end and e > start]
        if len(during) < self._machine.slots:
            return True
        # How many run at once changes only where one starts.
        return all(
            sum(1 for s, e in during if s <= at < e) < self._machine.slots
            for at in (start, *(s for s, _ in during if s > start))
        )
