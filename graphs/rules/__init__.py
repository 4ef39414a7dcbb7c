"""Planning by rules: how a question is written tells its parts and what each of them needs."""

from graphs.rules.planner import RulePlanner

__all__ = ["RulePlanner"]
