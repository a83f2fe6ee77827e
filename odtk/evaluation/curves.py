"""Training curves: the values that training wrote to LOGDIR/metrics.jsonl, as plots."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..config import OdtkError
from ..files import make_folder
from .evaluate import STATS

ACCURACIES = ("top-1", "top-5", "precision", "recall", "F1")  # of a classifier
PER_CLASS = {"AP/": "AP per class", "F1/": "F1 per class"}  # plots of what begins so
MOST_CLASSES = 12  # whose lines can be told apart


def draw_curves(logdir: str, folder: str) -> list[str]:
    """Plots losses, learning rate, speed and validation AP and AR over the iterations, in one PNG. Returns its path.

    AP per class is plotted if there are at most MOST_CLASSES.

    Raises:
        OdtkError: LOGDIR/metrics.jsonl is missing or empty, matplotlib is not installed, or the PNG cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("agg")  # draws without a display
        from matplotlib import pyplot
    except ImportError as error:
        raise OdtkError("Training curves require matplotlib: pip install 'odtk[report]'.") from error
    curves = read_curves(Path(logdir) / "metrics.jsonl")
    plots: dict[str, list[str]] = defaultdict(list)
    many = sum(name[:3] in PER_CLASS for name in curves) > MOST_CLASSES
    for name in curves:
        if many and name[:3] in PER_CLASS:
            continue
        plots[plot_of(name)].append(name)
    figure, axes = pyplot.subplots(len(plots), 1, sharex=True, squeeze=False, figsize=(9, 2.6 * len(plots)))
    for axis, (title, names) in zip(axes[:, 0], plots.items(), strict=True):
        for name in names:
            x, y = zip(*curves[name], strict=True)
            label = name.replace("$", r"\$")  # which would begin a formula
            axis.plot(x, y, label=label, linewidth=1.2, marker="o" if len(x) < 30 else None, markersize=3)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8, ncols=3, framealpha=0.6)
    axes[-1, 0].set_xlabel("iteration")
    figure.tight_layout()
    path = make_folder(folder) / "curves.png"
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise OdtkError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        pyplot.close(figure)
    return [str(path)]


def plot_of(name: str) -> str:
    """The title of the plot that a logged value belongs to."""
    if name[:3] in PER_CLASS:
        return PER_CLASS[name[:3]]
    if name in STATS:
        return f"validation {name[:2]}"
    if name in ACCURACIES:
        return "validation accuracy"
    return {"lr": "learning rate", "images_per_second": "images per second"}.get(name, "loss")


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(iteration, value) pairs by name, from a metrics.jsonl.

    Where a resumed run repeated iterations, the later values count. A last line that was cut off is left out.

    Raises:
        OdtkError: the file is missing, or holds no values.
    """
    if not path.is_file():
        raise OdtkError(f"There is no {path}: train with --logdir {path.parent} to write it.")
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        while records and records[-1]["iteration"] > record["iteration"]:
            records.pop()
        records.append(record)
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        for name, value in record.items():
            undefined = name in STATS and value < 0  # COCO's −1: the set has no objects of that size
            if name not in ("iteration", "time") and isinstance(value, (int, float)) and not undefined:
                curves[name][record["iteration"]] = value
    if not curves:
        raise OdtkError(f"{path} holds no values yet.")
    return {name: list(values.items()) for name, values in curves.items()}
