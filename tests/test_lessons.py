"""The common start of the notebooks, self-checking exercises, intervals."""

import io
import json
import math
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from nitro_e_lite import stats
from nitro_e_lite.course import lessons

PARAMETERS = {"preset": "smoke", "seed": 3, "devices": 1, "overrides": []}


@pytest.fixture
def begin(tmp_path, monkeypatch):
    monkeypatch.delenv("NITRO_E_FIGURES", raising=False)

    def begin(**changes):
        return lessons.start("99_lesson", **(PARAMETERS | {"run_dir": str(tmp_path / "run")} | changes))

    return begin


def test_start_seeds_everything_and_prints_one_line(begin, capsys):
    first = begin()
    draws = torch.randn(3), torch.randn(3, generator=first.generator)
    assert len(capsys.readouterr().out.splitlines()) == 1
    second = begin()
    again = torch.randn(3), torch.randn(3, generator=second.generator)
    assert torch.equal(torch.stack(draws), torch.stack(again))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preset", "large"),
        ("preset", 1),
        ("seed", "3"),
        ("seed", True),
        ("seed", -1),
        ("devices", 0),
        ("devices", 1.0),
        ("run_dir", None),
        ("overrides", "steps=3"),
        ("overrides", [3]),
        ("train", "false"),
        ("count", "3"),
        ("rate", "1e-3"),
    ],
)
def test_start_refuses_a_wrong_parameter_by_name(begin, name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        begin(**{name: value})


def test_start_takes_words_as_extra_parameters(begin):
    assert begin(caption="two red stars", train=False, empty="").extra["caption"] == "two red stars"


def test_a_relative_run_dir_lies_in_the_checkout(monkeypatch):
    root = lessons.runtime.repo_root()
    monkeypatch.chdir(root / "tests")
    assert lessons._run_folder("runs/x") == root / "runs" / "x"


def test_a_relative_run_dir_lies_in_the_current_folder_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert lessons._run_folder("runs/x") == tmp_path / "runs" / "x"


DIALS = {
    "smoke": {"steps": 6, "rate": 0.1, "widths": (8, 16)},
    "lite": {"steps": 60, "rate": 0.1, "widths": (8, 16)},
    "full": {"steps": 600, "rate": 0.1, "widths": (8, 16)},
}


def test_settings_follow_preset_and_overrides(begin):
    settings = begin(preset="lite", overrides=["rate=1e-3", "widths=[4]"]).settings(**DIALS)
    assert (settings.steps, settings.rate, settings.widths) == (60, 1e-3, (4,))


@pytest.mark.parametrize("override", ["step=3", "steps=many", "steps"])
def test_settings_refuse_an_override_that_does_not_fit(begin, override):
    with pytest.raises(ValueError, match="step"):
        begin(overrides=[override]).settings(**DIALS)


def test_settings_need_the_same_dials_at_every_scale(begin):
    with pytest.raises(ValueError, match="same names"):
        begin().settings(**DIALS | {"full": {"steps": 600}})


def test_figures_go_to_the_run_folder_and_name_their_notebook(begin):
    lesson = begin(overrides=["steps=3"], caption="a star")
    figure, axis = plt.subplots()
    assert lesson.save_figure(figure, "99_empty", alt="An empty plot.") is figure
    assert not plt.fignum_exists(figure.number)  # the cell shows what it returns; pyplot would show it again
    lesson.save_figure(Image.new("RGB", (8, 8)), "99_black", alt="A black square.")
    folder = lesson.run_dir / "figures"
    assert Image.open(folder / "99_black.png").size == (8, 8)
    entry = json.loads((folder / "ledger.json").read_text())["99_empty.png"]
    assert entry["source"] == "notebooks/99_lesson.ipynb"
    assert entry["seed"] == 3
    assert entry["params"] == {"preset": "smoke", "devices": 1, "overrides": ["steps=3"], "caption": "a star"}


def test_figures_go_to_the_checkout_when_notebooks_are_refreshed(begin, monkeypatch, tmp_path):
    monkeypatch.setenv("NITRO_E_FIGURES", str(tmp_path / "figures"))
    lesson = begin()
    lesson.save_figure(Image.new("RGB", (8, 8)), "99_black", alt="A black square.")
    assert (tmp_path / "figures" / "99_black.png").is_file()
    assert not (lesson.run_dir / "figures").exists()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (torch.ones(2) + 1e-7, torch.ones(2)),
        ([1, 2], torch.tensor([1.0, 2.0])),
        (3, 3.0),
        ("two", "two"),
        (True, True),
        ({"a": 1}, {"a": 1}),
        ([3, 1, 2], lambda answer: sorted(answer) == [1, 2, 3]),
    ],
)
def test_check_accepts_a_right_answer(answer, expected, capsys):
    lessons.check("1", answer, expected)
    assert capsys.readouterr().out == "● 1: correct\n"


def test_check_says_when_an_exercise_is_untouched(capsys):
    lessons.check("1", None, 3)
    assert capsys.readouterr().out == "○ 1: not attempted yet\n"


@pytest.mark.parametrize(
    ("answer", "expected", "message"),
    [
        (torch.ones(2), torch.ones(3), r"shape should be \(3,\)"),
        (torch.tensor([1.0, 2, 4]), torch.tensor([1.0, 2, 3]), r"1 of 3 numbers differ; the first at \(2,\)"),
        (4, 3, "expected 3, got 4"),
        (math.nan, 3.0, "got nan"),
        ("three", "two", "expected 'two'"),
        (1, True, "expected True"),
        ({"a": 1}, {"a": 2}, "expected {'a': 2}"),
        ("three", 3, "expected 3"),
        ([3], lambda answer: False, "property"),
    ],
)
def test_check_explains_a_wrong_answer(answer, expected, message):
    with pytest.raises(AssertionError, match=message):
        lessons.check("1", answer, expected)


def test_interval_of_three_values_against_the_textbook():
    mean, half = lessons.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)  # t(0.975, 2) = 4.303, s = 1
    _, wider = lessons.interval([1.0, 2.0, 3.0], together=5)
    assert wider == pytest.approx(9.925 / math.sqrt(3), rel=1e-4)  # t(0.995, 2): five intervals at 99 % hold at 95 %


@pytest.mark.parametrize(("count", "t"), [(11, 2.2281), (12, 2.2010), (21, 2.0860), (61, 2.0003)])
def test_interval_against_a_table_of_students_t(count, t):
    values = list(range(count))
    assert stats.interval(values)[1] == pytest.approx(t * statistics.stdev(values) / math.sqrt(count), rel=1e-4)


def test_interval_of_a_share_against_known_values():
    assert stats.share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert stats.share_interval(16, 16) == pytest.approx((16 / (16 + 1.959964**2), 1.0))
    assert stats.share_interval(0, 5)[0] == 0
    with pytest.raises(ValueError, match="right=3, count=2"):
        stats.share_interval(3, 2)


def test_paired_interval_against_the_normal_one_and_over_prompts():
    first = [float(k % 3 == 0) for k in range(300)]
    second = [float(k % 4 == 0) for k in range(300)]
    mean, low, high = stats.paired_interval(first, second, range(300))
    half = 1.96 * statistics.stdev(a - b for a, b in zip(first, second, strict=True)) / math.sqrt(300)
    assert mean == pytest.approx(100 / 300 - 75 / 300)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)
    copies = stats.paired_interval(first * 4, second * 4, [*range(300)] * 4)  # four times the same says no more
    assert copies == pytest.approx((mean, low, high))
    with pytest.raises(ValueError, match="equally many"):
        stats.paired_interval([1.0], [], [0])


def test_interval_needs_repeats():
    with pytest.raises(ValueError, match="two"):
        lessons.interval([1.0])


def soft_picture():
    """Two soft ramps, as in the backgrounds of scenes: over 256 colours."""
    ramp = np.linspace(100, 220, 300)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp, 150), -1).astype(np.uint8))


def test_a_picture_is_shown_as_one_small_jpeg_without_bands():
    picture = soft_picture()
    shown = Image.open(io.BytesIO(data := lessons._jpeg(picture)))
    assert shown.format == "JPEG" and len(data) < 20_000
    assert np.abs(np.asarray(shown, int) - np.asarray(picture, int)).max() <= 4


def test_a_picture_is_saved_with_all_its_colours_unless_that_is_large(monkeypatch):
    picture, encoded = soft_picture(), []
    png = lessons._png
    monkeypatch.setattr(lessons, "_png", lambda image: encoded.append(image) or png(image))
    assert lessons._light(picture, 200_000) is picture
    assert encoded == [picture], "once: on large pictures it takes a second"
    few = lessons._light(picture, 100)
    assert few.mode == "P" and len(few.getcolors()) <= 64


def test_a_function_is_tried_on_inputs_that_the_notebook_does_not_show(capsys):
    truth = lessons.Hidden(lambda n: n + 1, ((1,), (2,), (5,)))
    lessons.check("1", lambda n: n + 1, truth)
    lessons.check("2", lambda n: None, truth)
    assert capsys.readouterr().out == "● 1: correct\n○ 2: not attempted yet\n"
    for wrong, count in ((lambda n: 2, 2), (lambda n: 2 if n == 1 else None, 2), (lambda n: 2 * n, 2)):
        with pytest.raises(AssertionError, match=f"1: wrong for {count} of 3 inputs"):
            lessons.check("1", wrong, truth)


def test_gaps_say_what_stands_out_of_the_noise(capsys):
    smoke = {"a\nlate": [0.9, 1.0, 1.1], "b": [-1.0, 0.0, 1.1]}
    figure = lessons.gaps({"smoke": smoke, "lite": {"a\nlate": [1.0, 1.0, 1.01]}}, "x")
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2].split()[0] for line in lines] == ["outside", "inside", "outside"]
    half = lessons.interval([0.9, 1.0, 1.1], together=2)[1]
    assert lines[0].startswith(f"smoke  a late: +1.0000 ± {half:.4f}, n = 3")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["b", "a\nlate"]


def test_what_was_measured_stands_beside_the_lite_run(begin, monkeypatch, tmp_path):
    monkeypatch.setattr(lessons, "RESULTS", tmp_path)
    (tmp_path / "99.json").write_text('{"dials": {"steps": 9}, "losses": [1, 2, 3]}')
    lesson = begin()
    runs = lesson.beside_lite({"steps": 2}, losses=(4, 5))
    assert runs["smoke"] == {"dials": {"steps": 2}, "losses": [4, 5]}
    assert runs["lite"]["losses"] == [1, 2, 3] and list(runs) == ["smoke", "lite"]
    assert list(begin(preset="lite").beside_lite({"steps": 9}, losses=[0])) == ["lite"]


def test_race_takes_turns_and_leaves_out_the_first_round():
    turns = []
    runners = {"one": lambda: turns.append(1), "two": lambda: (turns.append(2), sum(range(300_000)))}
    seconds = lessons.race(runners, rounds=5)
    assert turns == [1, 2] * 6
    assert {name: len(values) for name, values in seconds.items()} == {"one": 5, "two": 5}
    assert sum(seconds["two"]) > 10 * sum(seconds["one"])


def test_race_needs_runners_and_rounds():
    with pytest.raises(ValueError, match="at least one"):
        lessons.race({}, rounds=3)
    with pytest.raises(ValueError, match="at least one"):
        lessons.race({"one": int}, rounds=0)


def test_a_plot_is_shown_as_png():
    figure, axis = plt.subplots(figsize=(2, 1))
    axis.plot([0, 1])
    shown = Image.open(io.BytesIO(lessons._plot_png(figure)))
    plt.close(figure)
    assert shown.format == "PNG" and shown.width > 150
