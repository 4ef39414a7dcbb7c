"""What is done to an update before it travels: a chain of small stages, one idea a file."""

from fed.chain.chain import STAGES, Chain, Sent
from fed.chain.clip import Clip, norm_of
from fed.chain.int8 import Int8
from fed.chain.memory import Memory, Residual
from fed.chain.noise import Noise
from fed.chain.stage import Coder, Context, Place, Shaper, Stage
from fed.chain.top_k import TopK
from fed.chain.weight import Weight

__all__ = [
    "STAGES",
    "Chain",
    "Clip",
    "Coder",
    "Context",
    "Int8",
    "Memory",
    "Noise",
    "Place",
    "Residual",
    "Sent",
    "Shaper",
    "Stage",
    "TopK",
    "Weight",
    "norm_of",
]
