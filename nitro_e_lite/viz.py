"""Figures: grids of pictures, sampling strips, curves, and where each saved figure came from.

One style for the whole project, set here: eight colours that people with any common colour blindness can tell
apart (Okabe and Ito), and a line style that changes with the colour, so that curves are also told apart when
printed in grey.

A figure without its origin is a picture, not a result. `save_figure` therefore writes the file *and* an entry
in `figures/ledger.json`: what made it, with which parameters and seed, at which commit, on which device. The
PNG holds no time and no version, so the same data gives the same bytes; a figure that came out unchanged
keeps its ledger entry, and a checkout stays clean when its notebooks are run again.
"""

import datetime
import io
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nitro_e_lite import files, runtime
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import read_json, write_atomically

COLORS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=LINE_STYLES),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "figure.dpi": 100,
        "savefig.dpi": 150,
        "font.size": 9,
        "image.cmap": "cividis",
    }
)
LEDGER = "ledger.json"


def figures_dir() -> Path:
    """Where figures are saved: `NITRO_E_FIGURES`, else `figures/` in the checkout or the current folder."""
    return Path(os.environ.get("NITRO_E_FIGURES") or (files.repo_root() or Path.cwd()) / "figures")


def as_uint8(image: Any) -> np.ndarray:
    """A picture as uint8 `(H, W, 3)`, from PIL, uint8 or floats in [0, 1], `(H, W, 3)` or `(3, H, W)`.

    Raises:
        ValueError: for another shape.
    """
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)  # (H, W, 3)
    if array.ndim != 3 or array.shape[2] != 3:
        raise InvalidValue(f"image: expected (H, W, 3) or (3, H, W), got {array.shape}")
    if array.dtype != np.uint8:
        array = (array.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return array


_FOOT = 0.05  # inches that stay free below a grid: the layout lets labels of several lines reach a little too low


def image_grid(
    images: Sequence[Any], columns: int, labels: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Pictures in rows, each with an optional label below it, as one picture.

    Args:
        images: what `as_uint8` takes.
        columns: pictures in a row, >= 1.
        labels: one a picture; long ones wrap.
        title: above the whole.

    Raises:
        ValueError: no images, columns < 1, or another number of labels than images.
    """
    if not len(images):
        raise InvalidValue("images: empty; expected at least one picture")
    if columns < 1:
        raise InvalidValue(f"columns: {columns} is below 1")
    if labels is not None and len(labels) != len(images):
        raise InvalidValue(f"labels: {len(labels)} for {len(images)} images; expected one each")
    columns, rows, cell = min(columns, len(images)), math.ceil(len(images) / columns), 1.7
    texts = [textwrap.fill(label, 28) for label in labels] if labels else [""] * len(images)
    lines = max(text.count("\n") + 1 for text in texts) if labels else 0
    size = (cell * columns, rows * (cell + 0.14 * lines) + (0.3 if title else 0) + _FOOT)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(rect=(0, _FOOT / size[1], 1, 1 - _FOOT / size[1]))
    for axis, image, text in zip(axes.flat, images, texts, strict=False):
        _show(axis, image)
        axis.set_xlabel(text, fontsize=7.5, labelpad=3)
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    return as_picture(figure)


def as_picture(figure: Figure) -> Image.Image:
    """Draws a figure; grids of pictures are pictures themselves."""
    plt.close(figure)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(plt.rcParams["savefig.dpi"])
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _show(axis: Axes, image: Any) -> None:
    """A picture without ticks, grid or frame; its axis labels stay usable."""
    axis.imshow(as_uint8(image), interpolation="lanczos")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def film_strip(
    strips: Sequence[Sequence[Any]],
    column_labels: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Rows of frames as one picture, e.g. one row a prompt and one column a sampling step.

    Raises:
        ValueError: no frames, rows of unequal length, or labels that do not match.
    """
    lengths = {len(strip) for strip in strips}
    if len(lengths) != 1 or not lengths.isdisjoint({0}):
        raise InvalidValue(f"strips: expected rows of one equal length >= 1, got lengths {sorted(lengths)}")
    columns = lengths.pop()
    if column_labels is not None and len(column_labels) != columns:
        raise InvalidValue(f"column_labels: {len(column_labels)} for {columns} columns")
    if row_labels is not None and len(row_labels) != len(strips):
        raise InvalidValue(f"row_labels: {len(row_labels)} for {len(strips)} rows")
    size = (1.3 * columns + (1.0 if row_labels else 0), 1.35 * len(strips) + 0.4)
    figure, axes = plt.subplots(len(strips), columns, figsize=size, squeeze=False, layout="constrained")
    for row, strip in enumerate(strips):
        for column, frame in enumerate(strip):
            axis = axes[row, column]
            _show(axis, frame)
            if row == 0 and column_labels:
                axis.set_title(column_labels[column], fontsize=8)
        if row_labels:
            label = textwrap.fill(row_labels[row], 18)
            axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7.5)
    if title:
        figure.suptitle(title, fontsize=10)
    return as_picture(figure)


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    log_y: bool = False,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """Named curves in one plot.

    Args:
        series: name -> (x, y).
        xlabel, ylabel: with units.
        title: above the plot.
        log_y: logarithmic y axis.
        bands: name -> (low, high) drawn around that series.

    Raises:
        ValueError: no series, x and y of unequal length, or a band without a series.
    """
    if not series:
        raise InvalidValue("series: empty; expected at least one curve")
    figure, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for name, (x, y) in series.items():
        if len(x) != len(y):
            raise InvalidValue(f"series[{name!r}]: {len(x)} x values for {len(y)} y values")
        (line,) = axis.plot(x, y, label=name)
        if bands and name in bands:
            axis.fill_between(x, *bands[name], color=line.get_color(), alpha=0.15, linewidth=0)
    if unknown := set(bands or {}) - set(series):
        raise InvalidValue(f"bands: no series named {', '.join(sorted(unknown))}")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title or "", yscale="log" if log_y else "linear")
    if len(series) > 1:
        axis.legend(frameon=False)
    plt.close(figure)  # notebooks show a returned figure once; without this twice
    return figure


def schematic(
    boxes: Mapping[str, tuple[float, float]],
    arrows: Sequence[tuple[str, ...]],
    size: tuple[float, float],
    shaded: Sequence[str] = (),
) -> Figure:
    """Boxes and arrows in black, white and grey.

    Args:
        boxes: text -> (x, y) of its centre, in any unit.
        arrows: (from, to) or (from, to, words beside the arrow).
        size: of the figure, in inches.
        shaded: boxes to be filled with grey: those with weights, say.

    Raises:
        ValueError: an arrow or a shade for a box that is not there.
    """
    if unknown := {*shaded, *(text for arrow in arrows for text in arrow[:2])} - set(boxes):
        raise InvalidValue(f"schematic: no box with the text {min(unknown)!r}")
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    xs, ys = zip(*boxes.values(), strict=True)
    axis.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.6, max(ys) + 0.6))
    axis.set_axis_off()
    drawn = {}
    for text, place in boxes.items():
        frame = {"boxstyle": "round,pad=0.5", "facecolor": "0.85" if text in shaded else "white", "edgecolor": "black"}
        drawn[text] = axis.text(*place, text, ha="center", va="center", fontsize=8, bbox=frame)
    figure.canvas.draw()  # an arrow ends at the frame of a box, whose size is known only now
    for begin, end, *words in arrows:
        ends = {"patchA": drawn[begin].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        axis.annotate("", boxes[end], boxes[begin], arrowprops={"arrowstyle": "-|>", "color": "black"} | ends)
        if words:
            middle = [(a + b) / 2 for a, b in zip(boxes[begin], boxes[end], strict=True)]
            axis.text(*middle, words[0], ha="center", va="center", fontsize=7, backgroundcolor="white", zorder=4)
    plt.close(figure)
    return figure


def save_figure(
    figure: Figure | Image.Image,
    name: str,
    *,
    source: str,
    params: Mapping[str, Any],
    seed: int | None,
    alt: str,
) -> Path:
    """Writes `figures/NAME.png` and its entry in `figures/ledger.json`.

    Args:
        figure: a matplotlib figure or a picture.
        name: letters, digits, `_` and `-`; no suffix.
        source: the notebook or command that made it.
        params: JSON-able parameters that decide what it shows.
        seed: the seed used, None when nothing was drawn at random.
        alt: one sentence that says what there is to see, for readers who cannot.

    Returns:
        Path of the picture.

    Raises:
        ValueError: for a name with other characters, or an empty `source` or `alt`.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise InvalidValue(f"name: {name!r} may hold letters, digits, '_' and '-' only")
    for field, value in (("source", source), ("alt", alt)):
        if not value.strip():
            raise InvalidValue(f"{field}: empty; say in a few words what it is")
    folder = figures_dir()
    path, ledger_path = folder / f"{name}.png", folder / LEDGER
    data = _png_bytes(figure)
    ledger = read_json(ledger_path) if ledger_path.is_file() else {}
    facts = {"source": source, "params": dict(params), "seed": seed, "alt": alt}
    known = ledger.get(path.name, {})
    unchanged = path.is_file() and path.read_bytes() == data and {k: known.get(k) for k in facts} == facts
    if not unchanged:
        write_atomically(path, data)
        origin = {
            "commit": runtime.git_commit(),
            "device": runtime.device_name(runtime.pick_device()),
            "date": datetime.date.today().isoformat(),
        }
        text = json.dumps(ledger | {path.name: facts | origin}, indent=2, sort_keys=True, ensure_ascii=False)
        write_atomically(ledger_path, text + "\n")
    return path


def save_image(image: Image.Image, path: str | Path, facts: Mapping[str, Any]) -> Path:
    """Saves a picture as PNG with `facts` (prompt, seed, ...) in its text chunks, so it can be made again.

    Raises:
        ValueError: for a path that does not end in `.png`.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InvalidValue(f"path: {path.name!r} must end in .png")
    write_atomically(path, png_bytes(image, facts))
    return path


def png_bytes(image: Image.Image, facts: Mapping[str, Any]) -> bytes:
    """A picture as PNG with `facts` in its text chunks."""
    chunks, buffer = PngInfo(), io.BytesIO()
    for name, value in facts.items():
        chunks.add_itxt(name, str(value))
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def _png_bytes(figure: Figure | Image.Image) -> bytes:
    """PNG without time or version, so equal pictures are equal files."""
    buffer = io.BytesIO()
    if isinstance(figure, Image.Image):
        figure.save(buffer, format="PNG")
    else:
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
