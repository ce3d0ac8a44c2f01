"""What every notebook of the course shares: a common start, exercises that check themselves, honest numbers.

A lesson begins with the cell tagged `parameters` and one call of `start`, which checks what papermill may have
put there, seeds every generator and prints on what the numbers below were made:

    lesson = lessons.start("08_emmdit_assembled", preset=preset, seed=seed, devices=devices,
                           run_dir=run_dir, overrides=overrides)
    settings = lesson.settings(smoke=dict(steps=60), lite=dict(steps=600), full=dict(steps=6000))

`settings` holds the lesson's own dials at each scale; `overrides = ["steps=100"]` changes them. An exercise is
a stub that returns None and one `check`. A comparison reports `interval` over several seeds: a difference that
is smaller than the interval is noise and the lesson says so.

Figures go to `RUN_DIR/figures`, so that reading a lesson never changes the checkout. `nitro-e notebooks refresh`
sets `NITRO_E_FIGURES` to the checkout's `figures/`: only then are the committed pictures and their ledger rewritten.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image

from nitro_e_lite import config, files, runtime, viz
from nitro_e_lite.config import SCALES
from nitro_e_lite.errors import InvalidType, InvalidValue
from nitro_e_lite.stats import interval

__all__ = ["Hidden", "Lesson", "check", "gaps", "interval", "race", "start"]
RESULTS = files.PACKAGE_DIR / "course" / "results"  # of the lite run of a lesson, by its number
MAX_SHOWN, MAX_SAVED = 25_000, 200_000  # bytes of a PNG with all its colours, in a notebook and in figures/


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A running notebook; `start` makes it.

    Attributes:
        notebook: its file name without suffix, such as "08_emmdit_assembled".
        preset: "smoke", "lite" or "full".
        seed: what everything was seeded with.
        devices: accelerators asked for.
        run_dir: folder for what the notebook writes.
        overrides: "name=value" strings.
        extra: the notebook's own parameters.
        device: where tensors go.
        generator: CPU generator seeded with `seed`.
    """

    notebook: str
    preset: str
    seed: int
    devices: int
    run_dir: Path
    overrides: list[str]
    extra: dict[str, Any]
    device: torch.device
    generator: torch.Generator = field(repr=False)

    def settings(self, **scales: Mapping[str, Any]) -> Any:
        """The lesson's dials at this preset's scale, with `overrides` applied.

        Args:
            **scales: `smoke=dict(...)`, `lite=dict(...)`, `full=dict(...)`, all with the same names.

        Returns:
            A frozen dataclass with the dials as fields.

        Raises:
            ValueError: a scale is missing, the scales name different dials, or an override does not fit.
        """
        if set(scales) != set(SCALES) or len({frozenset(dials) for dials in scales.values()}) != 1:
            raise InvalidValue(f"settings: give {', '.join(SCALES)}, each with the same names")
        dials = dict(scales[self.preset])
        return config.override(dataclasses.make_dataclass("Settings", dials, frozen=True)(**dials), self.overrides)

    def once(self, measure: Callable[..., Any], *arguments: Any) -> Any:
        """`measure(*arguments)`; a lite run that was stopped does not measure again what it has measured.

        That holds for `nitro-e course results`, which says in `NITRO_E_RESULTS` where to keep things.

        Args:
            measure: gives what JSON can hold.
            *arguments: name the measurement, together with the name of `measure`.
        """
        if not (folder := os.environ.get("NITRO_E_RESULTS")):
            return measure(*arguments)
        file, name = Path(folder) / "measured.jsonl", f"{measure.__name__}{arguments}"
        for row in files.read_jsonl(file) if file.is_file() else ():
            if row["name"] == name:
                return row["value"]
        begin = time.process_time()
        value = measure(*arguments)
        files.append_jsonl(file, {"name": name, "value": value, "seconds": time.process_time() - begin})
        return value

    def beside_lite(self, dials: Mapping[str, Any], **measured: Any) -> dict[str, dict[str, Any]]:
        """What was measured just now, and beside it what the lite run found, which ships with the course.

        Args:
            dials: the settings it was measured with.
            **measured: by name, of what JSON can hold. A lesson may call this more than once.

        Returns:
            preset -> `measured` and, as "dials", the settings. Only one entry where this is the lite run.
        """
        number, folder = self.notebook[:2], os.environ.get("NITRO_E_RESULTS")
        now = json.loads(json.dumps({"dials": dict(dials)} | measured))
        if folder:
            file = Path(folder) / f"{number}.json"
            about = {"notebook": self.notebook, "seed": self.seed, "torch": torch.__version__.split("+")[0]}
            found = files.read_json(file) if file.is_file() else about | {"device": runtime.device_name(self.device)}
            files.write_atomically(file, json.dumps(found | now, indent=1) + "\n")
        stored = {} if self.preset == "lite" else {"lite": files.read_json(RESULTS / f"{number}.json")}
        return {self.preset: now} | stored

    def save_figure(self, figure: Figure | Image.Image, name: str, *, alt: str) -> Figure | Image.Image:
        """Saves a figure with its ledger entry; as the last line of a cell it also shows it.

        Args:
            figure: a matplotlib figure, or a picture, which is saved at most 1100 pixels wide.
            name: begins with the notebook's number, such as "08_parameters"; no suffix.
            alt: one sentence that says what there is to see.

        Returns:
            The figure, closed for pyplot, so that a notebook shows it once; a picture comes back as it was saved.
        """
        figure = _small(figure) if isinstance(figure, Image.Image) else figure
        params = {"preset": self.preset, "devices": self.devices, "overrides": self.overrides} | self.extra
        folder = os.environ.get("NITRO_E_FIGURES")
        os.environ["NITRO_E_FIGURES"] = folder or str(self.run_dir / "figures")
        try:
            viz.save_figure(
                _light(_drawn(figure) if isinstance(figure, Figure) else figure, MAX_SAVED),
                name,
                source=f"notebooks/{self.notebook}.ipynb",
                params=params,
                seed=self.seed,
                alt=alt,
            )
        finally:
            if folder is None:
                del os.environ["NITRO_E_FIGURES"]
        if isinstance(figure, Figure):
            plt.close(figure)
            _show_figures_small()
        return figure


def start(
    notebook: str, *, preset: str, seed: int, devices: int, run_dir: str, overrides: list[str], **extra: Any
) -> Lesson:
    """Checks the parameters, seeds everything, prints one line about this machine.

    Papermill's `-p flag false` passes the *string* "false"; such values are refused here and not half-way through.

    Args:
        notebook: the notebook's file name without suffix.
        preset: "smoke", "lite" or "full".
        seed: integer in [0, 2**32).
        devices: accelerators to use, >= 1.
        run_dir: folder for what the notebook writes; a relative one lies in the checkout when that is where the
            notebook runs, otherwise in the current folder.
        overrides: list of "name=value" strings.
        **extra: the notebook's own parameters, by name.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or value; the message names it.
    """
    types = {"preset": (preset, str), "seed": (seed, int), "devices": (devices, int), "run_dir": (run_dir, str)}
    for name, (value, wanted) in types.items():
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise InvalidType(f"{name}: expected {wanted.__name__}, got {value!r} ({type(value).__name__})")
    if not isinstance(overrides, list) or not all(isinstance(item, str) for item in overrides):
        raise InvalidType(f"overrides: expected a list of 'name=value' strings, got {overrides!r}")
    for name, value in extra.items():
        if isinstance(value, str) and not isinstance(meant := _meant(value), str):
            raise InvalidType(f"{name}: got the text {value!r} in place of {meant!r}; write {meant!r} without quotes")
    if preset not in SCALES:
        raise InvalidValue(f"preset: {preset!r} is not one of {', '.join(SCALES)}")
    if devices < 1:
        raise InvalidValue(f"devices: {devices} is below 1")
    runtime.seed_everything(seed)
    runtime.tune_cpu()
    _show_pictures_small()
    device = runtime.pick_device()
    folder = _run_folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"{notebook}: preset {preset}, seed {seed} | torch {torch.__version__.split('+')[0]} on "
        f"{runtime.device_name(device)}, {torch.get_num_threads()} CPU threads"
    )
    return Lesson(
        notebook=notebook,
        preset=preset,
        seed=seed,
        devices=devices,
        run_dir=folder,
        overrides=overrides,
        extra=extra,
        device=device,
        generator=torch.Generator().manual_seed(seed),
    )


def _show_pictures_small() -> None:
    """In a notebook, a picture is stored once, as a JPEG: by default it is a large PNG as well."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        formatters = shell.display_formatter.formatters
        formatters["image/png"].for_type(Image.Image, lambda image: None)
        formatters["image/jpeg"].for_type(Image.Image, _jpeg)


def _show_figures_small() -> None:
    """The same for a plot, as PNG. Only now: pyplot sets its own formatter with the first figure of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(Figure, _plot_png)


def _plot_png(figure: Figure) -> bytes:
    return _png(_light(_drawn(figure, dpi=figure.dpi, bbox_inches="tight"), MAX_SHOWN))


def _drawn(figure: Figure, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    return Image.open(buffer).convert("RGB")


def _small(image: Image.Image) -> Image.Image:
    """At most 1100 pixels wide."""
    image = image.convert("RGB")
    if image.width <= 1100:
        return image
    return image.resize((1100, round(image.height * 1100 / image.width)), Image.Resampling.LANCZOS)


def _light(image: Image.Image, limit: int) -> Image.Image:
    """The picture with all its colours, or, where its PNG would be over `limit` bytes, with those that suit it best."""
    found = image
    for colors, most in ((256, limit), (64, 2 * limit)):
        if len(_png(found)) <= most:
            break  # not encoded a second time: that takes a second of a lesson's minute
        found = image.quantize(colors, method=Image.Quantize.MEDIANCUT, kmeans=2)
    return found


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _jpeg(image: Image.Image) -> bytes:
    """Soft backgrounds stay soft, which a palette makes bands of."""
    buffer = io.BytesIO()
    _small(image).save(buffer, format="JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def _meant(text: str) -> bool | int | float | str:
    """The value a text looks like."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _run_folder(run_dir: str) -> Path:
    root = files.repo_root()
    inside = root is not None and Path.cwd().resolve().is_relative_to(root)
    return (root if inside else Path.cwd()) / run_dir


@dataclass(frozen=True)
class Hidden:
    """The truth of an exercise that asks for a function, kept out of the notebook: see `answers`.

    Attributes:
        truth: what the reader's function should do.
        inputs: several tuples of arguments, tried one after the other.
    """

    truth: Callable[..., Any]
    inputs: tuple[tuple, ...]

    def problem(self, function: Callable[..., Any], rtol: float, atol: float) -> str | None:
        """What is wrong with the reader's function; None when it is an untouched stub that returns None."""
        answers = [function(*arguments) for arguments in self.inputs]
        if all(answer is None for answer in answers):
            return None
        pairs = zip(answers, self.inputs, strict=True)
        wrong = [a is None or bool(_problem(a, self.truth(*given), rtol, atol)) for a, given in pairs]
        return f"wrong for {sum(wrong)} of {len(wrong)} inputs that were tried" if any(wrong) else ""


def check(name: str, answer: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compares the answer to an exercise with the truth.

    Prints "not attempted yet" when `answer` (or what it returns, where it is a function) is None and "correct" when it
    is right.

    Args:
        name: of the exercise.
        answer: what the reader's code gave; None from an untouched stub.
        expected: a tensor, a number, a sequence of numbers, any other value, a function `answer -> bool`, or, for an
            answer that is a function, a `Hidden`.
        rtol, atol: tolerances for numbers and tensors.

    Raises:
        AssertionError: the answer is wrong; the message says how.
    """
    compare = expected.problem if isinstance(expected, Hidden) else partial(_problem, expected=expected)
    problem = None if answer is None else compare(answer, rtol=rtol, atol=atol)
    if problem is None:
        print(f"○ {name}: not attempted yet")
        return
    if problem:
        raise AssertionError(f"{name}: {problem}")
    print(f"● {name}: correct")


def _problem(answer: Any, expected: Any, rtol: float, atol: float) -> str:
    """What is wrong with an answer; empty when nothing is."""
    if callable(expected):
        return "" if expected(answer) else f"{answer!r} does not have the property that was asked for"
    if isinstance(expected, (bool, str)):
        same = type(answer) is type(expected) and answer == expected
        return "" if same else f"expected {expected!r}, got {answer!r}"
    try:
        found, truth = torch.as_tensor(answer), torch.as_tensor(expected)
    except (TypeError, ValueError, RuntimeError):
        return "" if answer == expected else f"expected {expected!r}, got {answer!r}"
    found, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    if found.shape != truth.shape:
        return f"the shape should be {tuple(truth.shape)}, it is {tuple(found.shape)}"
    if torch.allclose(found, truth, rtol, atol):
        return ""
    if truth.numel() == 1:
        return f"expected {truth.item():.8g}, got {found.item():.8g}"
    wrong = ~torch.isclose(found, truth, rtol, atol)
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{wrong.sum()} of {truth.numel()} numbers differ; the first at {first}: "
        f"expected {truth[first]:.6g}, got {found[first]:.6g}"
    )


def gaps(found: Mapping[str, Mapping[str, Sequence[float]]], label: str, title: str | None = None) -> Figure:
    """Prints and draws differences with their intervals: which of them stand out of the noise, in which run.

    The intervals of one run are read side by side, so they are widened until all of them hold at 95 %.

    Args:
        found: run -> comparison -> the difference of each seed, such as `beside_lite` helps to find.
        label: what is compared; names the x axis.
        title: above the figure.
    """
    rows = list(dict.fromkeys(name for run in found.values() for name in run))
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.62 * len(rows)), layout="constrained")
    axis.axvline(0, color="grey", linewidth=1, linestyle="-")
    for (run, differences), marker, shift in zip(found.items(), "os^", (0.17, -0.17, 0), strict=False):
        for name, values in differences.items():
            mean, half = interval(values, together=len(differences))
            verdict = "inside the noise" if abs(mean) <= half else "outside the noise"
            print(f"{run:6} {' '.join(name.split())}: {mean:+.4f} ± {half:.4f}, n = {len(values)}: {verdict}")
            place = len(rows) - 1 - rows.index(name) + shift
            axis.plot(values, [place + 0.12] * len(values), "x", color="0.6", markersize=4)
            said = run if name == next(iter(differences)) else None
            fill = "white" if marker == "o" else "black"
            style = {"fmt": marker, "color": "black", "markerfacecolor": fill, "markersize": 5, "capsize": 3}
            axis.errorbar(mean, place, xerr=half, label=said, **style)
    axis.set(xlabel=f"{label} (x: each seed)", yticks=range(len(rows)), yticklabels=rows[::-1], title=title or "")
    axis.set_ylim(-0.5, len(rows) - 0.4)
    axis.grid(axis="y", visible=False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def race(runners: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each function, one after the other, round after round, without gradients.

    Turns are fair: whatever slows the machine down slows all runners. On a CPU, the processor's seconds are counted
    (the sum over threads), which do not grow when other programs are given their share; on an accelerator, the
    clock's, until the work is done. A first round warms up and does not count.

    Args:
        runners: name -> function without arguments.
        rounds: how often each of them runs.

    Returns:
        name -> seconds of each round, in order.

    Raises:
        ValueError: no runner, or no round.
    """
    if not runners or rounds < 1:
        raise InvalidValue(f"rounds: {rounds} with {len(runners)} runners; give at least one of each")
    device = torch.accelerator.is_available()
    clock = time.perf_counter if device else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, run in runners.items():
                begin = clock()
                run()
                if device:
                    torch.accelerator.synchronize()
                seconds[name].append(clock() - begin)
    return {name: values[1:] for name, values in seconds.items()}
