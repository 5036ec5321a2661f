"""How plots look; the one file that imports matplotlib, and only once something is drawn."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
    }
)


def new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` axes side by side."""
    figure = Figure(figsize=(5.2 * columns, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def save(figure: Figure, path: Path) -> None:
    """Give every axes with labelled lines its legend, and write a PNG. Raises OSError where that fails."""
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    write_whole(path, drawn.getvalue())
