"""Examples to train on, and how they are divided among clients."""

from fed.data.check import CheckedClients, check_clients
from fed.data.example import Example, Subset
from fed.data.partition import PARTITIONS, ByGroup, ByQuantity, Dirichlet, Iid, Partition, Split
from fed.data.sources import INSTRUCTIONS, glue, instructions, jsonl, title_abstract
from fed.data.tasks import GLUE, GlueTask
from fed.data.template import Template

__all__ = [
    "GLUE",
    "INSTRUCTIONS",
    "PARTITIONS",
    "ByGroup",
    "ByQuantity",
    "CheckedClients",
    "Dirichlet",
    "Example",
    "GlueTask",
    "Iid",
    "Partition",
    "Split",
    "Subset",
    "Template",
    "check_clients",
    "glue",
    "instructions",
    "jsonl",
    "title_abstract",
]
