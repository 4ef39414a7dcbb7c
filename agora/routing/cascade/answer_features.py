"""What an answer itself shows of how far it can be trusted."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.policy import Seen
from agora.routing.cascade.text_features import numbers_in

MAX_CHARS: Final = 16_384
"""Characters of an answer that are looked at: some 4,000 tokens, twenty times what experts are asked for
if nothing else is said. It bounds the time that
one answer's patterns take."""

MAX_EQUATIONS: Final = 64
"""Written calculations of one answer that are checked: a grade-school problem takes two to eight steps (GSM8K). It
bounds the time for an answer that goes in circles."""

OWN: Final = 8
"""Features of an answer in `own_features`, before its signals."""

_EQUATION: Final = re.compile(
    r"((?:[\d(.][\d\s.,()]{0,24}[-+*/×]\s{0,2}){1,8}[\d(.][\d.,()]{0,20})\s{0,2}=\s{0,2}\$?\s{0,2}(-?\d[\d,]{0,20}(?:\.\d{1,10})?)"
)
_HEDGES: Final = re.compile(
    r"\b(?:however|assum\w{1,4}|approximately|about|wait|actually|can't|cannot|not possible|since we)\b", re.IGNORECASE
)

_OPERATORS: Final[Mapping[type[ast.operator], Callable[[float, float], float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def answer_signals(question: str, text: str) -> dict[str, float]:
    """Signals that can be read from an answer's text without asking anybody.

    Args:
        question: What was asked.
        text: The whole answer, not just its end.

    Returns:
        By name: `chars`, `lines` and `equations` (log counts), `wrong_equations` (share of the written calculations
        that do not add up; 0 where there are none), `finished` (whether it ends like a sentence, a number or a closed
        text), `unused` (share of the question's numbers that do not occur), `new_numbers` (log count of those that are
        not the question's), `hedges` (log count of words of doubt), `ends_marked` (whether a final answer is marked as
        such).
    """
    text = text[:MAX_CHARS]
    asked, said = set(numbers_in(question)), numbers_in(text)
    checked = [_holds(m[1], m[2]) for m, _ in zip(_EQUATION.finditer(text), range(MAX_EQUATIONS), strict=False)]
    known = [c for c in checked if c is not None]
    return {
        "chars": math.log1p(len(text)),
        "lines": math.log1p(text.count("\n") + text.count("\\n")),
        "equations": math.log1p(len(known)),
        "wrong_equations": sum(not c for c in known) / len(known) if known else 0.0,
        "finished": float(text.rstrip().endswith((".", "!", "`", "}", "]", "$")) or "####" in text[-40:]),
        "unused": len(asked - set(said)) / len(asked) if asked else 0.0,
        "new_numbers": math.log1p(len(set(said) - asked)),
        "hedges": math.log1p(len(_HEDGES.findall(text))),
        "ends_marked": float("####" in text or "boxed" in text or '"answer"' in text),
    }


def _holds(left: str, right: str) -> bool | None:
    """Whether a written calculation is right, to 1 %; None if it is none that can be read."""
    try:
        value = _value(ast.parse(left.replace(",", "").replace("×", "*").strip(), mode="eval").body)
        told = float(right.replace(",", ""))
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None
    return abs(value - told) <= 0.01 * max(1.0, abs(told))


def _value(node: ast.expr) -> float:
    """Value of numbers joined by + - * /: the tree is walked, nothing is run."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no plain calculation")


def own_features(question: str, seen: Seen, names: Sequence[str]) -> NDArray[np.float64]:
    """Features of one answer, shape (`OWN` + len(names),); a signal that is not told is NaN.

    Args:
        question: What was asked.
        seen: The answer.
        names: Signals that count, in order.
    """
    answer = seen.answer
    value = _number(answer)
    features = [
        float(answer is None),
        float(value is not None),
        math.log1p(len(answer or "")),
        0.0 if value is None else math.log1p(abs(value)),
        float(value is not None and value < 0),
        float(value is not None and value != math.floor(value)),
        float(value is not None and value in numbers_in(question)),
        math.log(max(seen.cost, 1e-12)),
    ]
    return np.array([*features, *(seen.signals.get(name, math.nan) for name in names)])


def _number(answer: str | None) -> float | None:
    if answer is None or len(answer) > 40:
        return None
    try:
        value = float(answer)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e15 else None
