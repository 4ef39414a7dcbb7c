"""Device → edge → cloud: a tree of aggregators, each with its own pace, rule and server; see `simulate_tree`."""

from fed.hierarchy.level import Level, Link, Orphans
from fed.hierarchy.mix import Fitted, fit, mix, personal
from fed.hierarchy.sees import Sees, View
from fed.hierarchy.simulate import simulate_tree
from fed.hierarchy.tree import Aggregator, Tree
from fed.hierarchy.words import LevelReport, Made, TreeResult

__all__ = [
    "Aggregator",
    "Fitted",
    "Level",
    "LevelReport",
    "Link",
    "Made",
    "Orphans",
    "Sees",
    "Tree",
    "TreeResult",
    "View",
    "fit",
    "mix",
    "personal",
    "simulate_tree",
]
