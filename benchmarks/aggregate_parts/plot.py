"""Draws how far rules are from the best, and how fast averaging is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from agora.errors import InvalidRequest

STYLE: Final[Mapping[str, tuple[str, str]]] = {
    "delta": ("tab:green", "-"),
    "delta_without_error": ("tab:olive", ":"),
    "factor_mean": ("tab:red", "-"),
    "factor_mean_of_updates": ("tab:orange", "--"),
}

LOG_FROM: Final = 3.0
"""Errors above that are drawn on a logarithmic axis."""


def plot(file: Path, result: Mapping[str, Any]) -> None:
    """Writes the picture.

    Args:
        file: Where to; its ending says the format.
        result: Of `benchmarks.aggregate.measure`.

    Raises:
        InvalidRequest: If matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InvalidRequest("--plot needs matplotlib", hint="pip install 'agora-llm[plots]'") from None
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6))
    for axis, (ranks, courses) in zip(axes, result["courses"].items(), strict=False):
        for rule, course in courses.items():
            rounds = [int(n) for n in course["to_sum"]]
            colour, line = STYLE[rule]
            axis.plot(rounds, course["to_sum"].values(), line, color=colour, marker="o", label=rule.replace("_", " "))
        axis.axhline(1.0, color="black", linewidth=0.6)
        axis.set(title=f"{ranks} ranks", xlabel="round", ylabel="error over that of the best adapter")
        if max(max(course["to_sum"].values()) for course in courses.values()) > LOG_FROM:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center right")
    _speeds(axes[2], result)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"the plot cannot be written to {str(file)!r}: {e}") from None
    finally:
        plt.close(figure)


def _speeds(axis: Any, result: Mapping[str, Any]) -> None:
    models = list(result["gb_per_s"])
    bars = {
        "agora": ("tab:green", result["gb_per_s"]),
        "Flower FedAvg": ("tab:red", result["flower_gb_per_s"]),
        "Flower, arithmetic alone": ("tab:pink", result["flower_arithmetic_gb_per_s"]),
    }
    for n, (name, (colour, values)) in enumerate(bars.items()):
        heights = [values[m] or 0.0 for m in models]
        drawn = axis.bar([i + 0.27 * (n - 1) for i in range(len(models))], heights, 0.25, color=colour, label=name)
        axis.bar_label(drawn, [f"{v:.2g}" if v else "–" for v in heights], fontsize=8)
    axis.set_xticks(range(len(models)), models)
    axis.set(title="plain weighted averaging, 16 clients", ylabel="GB/s of factors")
    axis.legend(fontsize=8)
