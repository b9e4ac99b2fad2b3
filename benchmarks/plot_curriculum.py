"""Picture of a result of curriculum.py: accuracy against training time.

python benchmarks/plot_curriculum.py benchmarks/results/curriculum.json docs/images/curriculum.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Draw one line a run."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    result = json.loads(source.read_text())
    figure, axes = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    for (side, runs), color in zip(result["runs"].items(), ("tab:blue", "tab:gray"), strict=True):
        for index, run in enumerate(runs):
            points = [(p["seconds"], 100 * p["top1"]) for p in run["curve"]]
            label = f"{side}, {result['epochs'][side]:g} epochs" if index == 0 else None
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, alpha=0.8, label=label)
    axes.set_xlabel("training time, s")
    axes.set_ylabel("held-out top-1, %")
    axes.set_title(
        f"{Path(result['config']).stem}, {result['ranks']} processes on {result['cores']} CPU cores", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
