"""Quality over cost, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agora.errors import InvalidRequest
from benchmarks.tiers_parts.experts import TIERS


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws each tier alone, their random mixes, agora, and the oracle.

    Raises:
        InvalidRequest: If matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise InvalidRequest("plots need matplotlib", hint="pip install 'agora-llm[plots]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    unit = 1e6  # money per million questions: no powers of ten on the axis
    alone = [(result["tiers"][t]["cost"] * unit, result["tiers"][t]["quality"], t) for t in TIERS]
    hull = _hull([(x, y) for x, y, _ in alone])
    axes.plot(*zip(*hull, strict=True), "--", color="0.6", label="random mix of tiers")
    middle = max(x for x, _, _ in alone) / 2
    for x, y, name in alone:
        axes.plot(x, y, "o", color="tab:blue", markersize=8)
        side, shift = ("left", 8) if x < middle else ("right", -4)
        axes.annotate(f"{name} alone", (x, y), textcoords="offset points", xytext=(shift, -17), ha=side)
    if curve := result["agora"].get("curve"):
        points = sorted((p["cost"] * unit, p["quality"]) for p in curve)
        axes.plot(*zip(*points, strict=True), "-", color="tab:orange", alpha=0.6, label="agora, other trade-offs")
    agora, oracle = result["agora"], result["oracle"]
    axes.plot(agora["cost"] * unit, agora["quality"], "D", color="tab:orange", markersize=9, label="agora")
    axes.plot(oracle["cost"] * unit, oracle["quality"], "*", color="tab:green", markersize=13, label="oracle")
    n = result["questions"]
    axes.set(
        xlabel="money per million questions (1 per billion parameters and million tokens)",
        ylabel="share of right answers",
        title=f"Three real tiers: {n['gsm8k']} GSM8K and {n['sst2']} SST-2 questions" + (" (quick)" * result["quick"]),
        ylim=(0, 1.02),
    )
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"the plot cannot be written to {str(file)!r}: {e}") from None
    finally:
        plt.close(figure)


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper concave hull, from the cheapest to the best."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        while len(kept) >= 2 and _above(kept[-2], kept[-1], (x, y)):
            kept.pop()
        if not kept or y > kept[-1][1]:
            if kept and kept[-1][0] == x:
                kept.pop()
            kept.append((x, y))
    return kept


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or under the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])
