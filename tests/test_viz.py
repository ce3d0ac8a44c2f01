"""Grids, strips, curves, and the ledger of saved figures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nitro_e_lite import viz


@pytest.fixture
def figures(monkeypatch, tmp_path):
    monkeypatch.setenv("NITRO_E_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


def pictures(count: int) -> list[np.ndarray]:
    return [np.full((8, 8, 3), 20 * i, np.uint8) for i in range(count)]


def test_as_uint8_takes_every_form_of_a_picture():
    array = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    for image in (array, Image.fromarray(array), tensor, array / 255.0):
        assert np.array_equal(viz.as_uint8(image), array)
    with pytest.raises(ValueError, match="image: expected"):
        viz.as_uint8(np.zeros((4, 4)))


def shares(image: Image.Image, shades: list[int]) -> list[float]:
    """Which part of a picture has exactly each shade of grey."""
    array = np.asarray(image)
    return [float((array == shade).all(-1).mean()) for shade in shades]


def test_grid_shows_every_picture_at_one_size():
    shades = [20, 40, 60, 80, 100]
    images = [np.full((8, 8, 3), shade, np.uint8) for shade in shades]
    found = shares(viz.image_grid(images, columns=3), shades)
    assert min(found) > 0.1 and max(found) - min(found) < 0.01


def test_grid_grows_for_labels_and_title():
    plain = viz.image_grid(pictures(2), columns=2)
    labelled = viz.image_grid(pictures(2), columns=2, labels=["a word " * 10, ""], title="two")
    assert labelled.width == plain.width and labelled.height > plain.height
    assert shares(plain, [0])[0] > 0.3  # black letters do not count: the first picture is black


@pytest.mark.parametrize("lines", [1, 2, 3, 4])
def test_grid_shows_labels_whole(lines):
    for title in (None, "a title"):
        label = "gypsy quay " * (2 * lines)  # two fit a line
        grid = np.asarray(viz.image_grid(pictures(6), 6, [label] * 6, title))
        assert (grid[-1] == 255).all() and (grid[:, -1] == 255).all()  # nothing is cut off at the border


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"images": [], "columns": 1}, "images"),
        ({"images": pictures(1), "columns": 0}, "columns"),
        ({"images": pictures(2), "columns": 1, "labels": ["one"]}, "labels"),
    ],
)
def test_grid_refuses(arguments, field):
    with pytest.raises(ValueError, match=field):
        viz.image_grid(**arguments)


def test_film_strip():
    strips = [[np.full((8, 8, 3), 40 * row + 10 * column, np.uint8) for column in range(1, 4)] for row in (1, 2)]
    strip = viz.film_strip(strips, column_labels=list("abc"), row_labels=["top", "bottom"], title="strip")
    assert min(shares(strip, [50, 60, 70, 90, 100, 110])) > 0.05
    for strips in ([], [[]], [pictures(2), pictures(3)]):
        with pytest.raises(ValueError, match="strips"):
            viz.film_strip(strips)
    with pytest.raises(ValueError, match="column_labels"):
        viz.film_strip([pictures(2)], column_labels=["a"])
    with pytest.raises(ValueError, match="row_labels"):
        viz.film_strip([pictures(2)], row_labels=["a", "b"])


def test_curves_differ_in_colour_and_in_line_style():
    x = [0, 1, 2]
    figure = viz.curve({name: (x, x) for name in "abc"}, "step", "loss", log_y=True, bands={"a": (x, [1, 2, 3])})
    lines = figure.axes[0].lines
    assert len({line.get_color() for line in lines}) == len({str(line.get_linestyle()) for line in lines}) == 3
    assert figure.axes[0].get_yscale() == "log"


def test_curve_refuses():
    with pytest.raises(ValueError, match="series: empty"):
        viz.curve({}, "x", "y")
    with pytest.raises(ValueError, match="2 x values for 1"):
        viz.curve({"a": ([0, 1], [0])}, "x", "y")
    with pytest.raises(ValueError, match="no series named b"):
        viz.curve({"a": ([0], [0])}, "x", "y", bands={"b": ([0], [0])})


def test_saved_figure_has_an_entry_and_equal_data_gives_equal_bytes(figures):
    def save(shade: int):
        figure = viz.curve({"shade": ([0, 1], [0, shade])}, "x", "y")
        return viz.save_figure(figure, "grey", source="a test", params={"shade": shade}, seed=0, alt="A grey square.")

    path = save(1)
    first, ledger = path.read_bytes(), (figures / "ledger.json").read_text()
    assert path == figures / "grey.png"
    entry = json.loads(ledger)["grey.png"]
    assert entry["source"] == "a test" and entry["params"] == {"shade": 1} and entry["alt"] == "A grey square."
    assert set(entry) == {"source", "params", "seed", "alt", "commit", "device", "date"}

    save(1)
    assert path.read_bytes() == first and (figures / "ledger.json").read_text() == ledger
    save(2)
    assert json.loads((figures / "ledger.json").read_text())["grey.png"]["params"] == {"shade": 2}


def test_an_unchanged_figure_keeps_its_entry(figures):
    arguments = {"source": "a test", "params": {}, "seed": None, "alt": "Black."}
    viz.save_figure(Image.new("RGB", (4, 4)), "black", **arguments)
    ledger = json.loads((figures / "ledger.json").read_text())
    ledger["black.png"]["date"] = "2001-01-01"
    (figures / "ledger.json").write_text(json.dumps(ledger))
    viz.save_figure(Image.new("RGB", (4, 4)), "black", **arguments)
    assert json.loads((figures / "ledger.json").read_text())["black.png"]["date"] == "2001-01-01"
    viz.save_figure(Image.new("RGB", (4, 4), "red"), "red", **arguments)
    assert set(json.loads((figures / "ledger.json").read_text())) == {"black.png", "red.png"}


@pytest.mark.parametrize(
    ("name", "source", "alt"), [("a/b", "s", "a"), ("", "s", "a"), ("a", " ", "a"), ("a", "s", "")]
)
def test_save_figure_refuses(figures, name, source, alt):
    with pytest.raises(ValueError):
        viz.save_figure(Image.new("RGB", (4, 4)), name, source=source, params={}, seed=0, alt=alt)
    assert not figures.exists()


def test_saved_image_tells_how_it_was_made(tmp_path):
    path = viz.save_image(Image.new("RGB", (4, 4)), tmp_path / "new" / "a.png", {"prompt": "a rød star", "seed": 3})
    with Image.open(path) as image:
        assert image.text == {"prompt": "a rød star", "seed": "3"}
    with pytest.raises(ValueError, match=r"must end in \.png"):
        viz.save_image(Image.new("RGB", (4, 4)), tmp_path / "a.jpg", {})


def test_schematic_draws_every_box_and_refuses_an_arrow_to_nowhere():
    figure = viz.schematic({"noise": (0, 0), "picture": (1, 0)}, [("noise", "picture", "20 steps")], (3, 1), ["noise"])
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"noise", "picture", "20 steps"} <= texts
    with pytest.raises(ValueError, match="'dog'"):
        viz.schematic({"noise": (0, 0)}, [("noise", "dog")], (3, 1))
