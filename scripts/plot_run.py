"""Draw a run: its losses by name, and what validation said.

python scripts/plot_run.py runs/msmarco_small docs/msmarco_small.png --untrained 0.042
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def curve(rows: list[dict[str, str]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the metric ``name``."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over ``width`` points, shorter at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with metrics.csv")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--untrained", type=float, help="nDCG@10 before training (evaluate.py --model base:EXPORT)")
    args = parser.parse_args()
    with (args.run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = set(rows[0])
    losses = [name for name in ("contrastive", "sft", "dpo", "kl") if name in names]
    scores = sorted(name for name in names if name.startswith("val/"))

    figure, axes = plt.subplots(1, 1 + bool(scores), figsize=(5.2 * (1 + bool(scores)), 3.6), squeeze=False)
    for name in losses:
        steps, values = curve(rows, name)
        (line,) = axes[0, 0].plot(steps, values, alpha=0.25)
        axes[0, 0].plot(steps, smoothed(values, 15), color=line.get_color(), label=name)
    axes[0, 0].set(xlabel="step", ylabel="loss", yscale="log", title="training losses")
    axes[0, 0].legend(frameon=False)
    for name in scores:
        steps, values = curve(rows, name)
        axes[0, 1].plot(steps, values, marker="o", label=name.removeprefix("val/"))
    if scores and args.untrained is not None:
        axes[0, 1].axhline(args.untrained, color="grey", linestyle=":", label="ndcg@10 untrained")
    if scores:
        axes[0, 1].set(xlabel="step", xlim=(0, None), ylim=(0, None), title="dev collection")
        axes[0, 1].legend(frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=130)


if __name__ == "__main__":
    main()
