"""The raw layouts, each built here on a small scale with everything that is wrong in the real ones."""

import io
import json
import os
import shutil
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_flux import build_tiny_flux

from nitro_e_lite.data.sources import FLUX, SA1B, Folder, JourneyDB, Problem, Prompts, Record, square
from nitro_e_lite.errors import Unusable


def photo(width=40, height=30, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def everything(source):
    return [item for part in source.parts() for item in source.items(part)]


def problems(items):
    return {item.key: item.reason for item in items if isinstance(item, Problem)}


def check_positions(source):
    """Items from any position on are the rest of all items."""
    for part in source.parts():
        whole = list(source.items(part))
        for start in range(len(whole) + 1):
            rest = list(source.items(part, start))
            assert [item.key for item in rest] == [item.key for item in whole[start:]]
            assert [type(item) for item in rest] == [type(item) for item in whole[start:]]


# pictures


def test_square_keeps_the_middle():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert (square(Image.fromarray(wide), 20) == (0, 255, 0)).all()
    assert (square(Image.fromarray(wide.transpose(1, 0, 2)), 20) == (0, 255, 0)).all()
    assert square(Image.fromarray(wide), 40).shape == (40, 40, 3)  # enlarged: not below half


@pytest.mark.parametrize("width, height", [(16, 16), (17, 31), (333, 16), (33, 500), (8, 9)])
def test_odd_sizes(width, height):
    assert square(encoded(photo(width, height)), 16).shape == (16, 16, 3)


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF")])
def test_other_colour_modes_keep_their_colour(mode, kind):
    color = {"L": 200, "1": 1, "P": 3, "CMYK": (0, 255, 0, 0)}[mode]
    image = Image.new(mode, (32, 32), color)
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + [10, 120, 230])
    wanted = {"L": (200,) * 3, "1": (255,) * 3, "P": (10, 120, 230), "CMYK": (255, 0, 255)}[mode]
    found = square(encoded(image, kind), 16)
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - wanted).max() <= 4


@pytest.mark.parametrize("bits", [np.uint16, np.int32])
def test_sixteen_bit_grey_keeps_its_range(bits):
    values = np.full((32, 32), 128 * 257, bits)
    kind = "PNG" if bits is np.uint16 else "TIFF"
    assert (square(encoded(Image.fromarray(values), kind), 16) == 128).all()


def test_grey_in_fractions_of_one():
    values = np.full((32, 32), 0.5, np.float32)
    assert (square(encoded(Image.fromarray(values), "TIFF"), 16) == 128).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    options = {}
    if mode == "P":
        image, options = Image.new("P", (32, 32), 0), {"transparency": 0}
    assert (square(encoded(image.convert(mode), "PNG", **options), 16) == 255).all()


def test_exif_turns_the_picture():
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 32, 16))  # upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = square(encoded(image, exif=exif), 32)
    assert turned[:, 24:].mean() < 20 and turned[:, :8].mean() > 235


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be read"),
        (b"<html>link expired</html>", "cannot be read"),
        (encoded(photo(400, 300))[:3000], "cannot be read"),
        (encoded(photo(400, 300), "PNG")[:3000], "cannot be read"),
        (encoded(photo(7, 300)), "smaller than 8 px"),
        (Path("nowhere.jpg"), "is missing"),
    ],
)
def test_broken_pictures_say_why(data, reason):
    with pytest.raises(ValueError, match=reason):
        square(data, 16)


# SA-1B


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def sa1b(tmp_path):
    """Two tar files with masks, as served; captions as text files."""
    captions = tmp_path / "captions"
    captions.mkdir()
    for number, first in enumerate((1, 11186)):
        with tarfile.open(tmp_path / f"sa_{number:06d}.tar", "w") as tar:
            for k in range(first, first + 4):
                add(tar, f"./sa_{k}.jpg", encoded(photo(60 + k % 7, 45, seed=k)))
                add(tar, f"./sa_{k}.json", b'{"annotations": []}')
                (captions / f"sa_{k}.txt").write_text(f"A photo, number {k}: café, 東京.\n", encoding="utf-8")
    (captions / "sa_2.txt").unlink()
    (captions / "sa_3.txt").write_text(" \n")
    (captions / "sa_4.txt").write_bytes(b"\xff\xfe\x00broken")
    return tmp_path


def test_sa1b(sa1b):
    source = SA1B(sa1b)
    assert source.parts() == ["sa_000000", "sa_000001"]
    items = everything(source)
    assert [item.key for item in items] == [f"sa_{k}" for k in (1, 2, 3, 4, 11186, 11187, 11188, 11189)]
    assert items[0].captions == ["A photo, number 1: café, 東京."]
    assert square(items[0].image, 32).shape == (32, 32, 3)
    reasons = problems(items)
    assert reasons["sa_2"] == reasons["sa_3"] == "caption is missing or empty"
    assert reasons["sa_4"] == "caption is not UTF-8" and len(reasons) == 3
    check_positions(source)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.62])
def test_sa1b_tar_cut_short(sa1b, share):
    path = sa1b / "sa_000001.tar"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    source = SA1B(sa1b)
    items = list(source.items("sa_000001"))
    assert len(items) < 5 and items[-1].cut_at == source.stamp("sa_000001")
    assert items[-1].cut_at[0] == path.stat().st_size and "tar file was cut short" in items[-1].reason
    assert all(isinstance(item, Record) for item in items[:-1])
    for start in range(len(items)):
        assert [item.key for item in source.items("sa_000001", start)] == [item.key for item in items[start:]]


def headers(path):
    with tarfile.open(path) as tar:
        return {member.name: (member.offset, member.offset_data) for member in tar}


@pytest.mark.parametrize("hurt", ["header", "hole", "hole within a picture"])
def test_a_tar_file_with_a_damaged_header_or_a_hole_to_its_end_is_not_whole(sa1b, hurt):
    """tarfile stops at both without a word, and its last bytes are as empty as of a whole file."""
    path = sa1b / "sa_000001.tar"
    content = bytearray(path.read_bytes())
    header, picture = headers(path)["./sa_11188.jpg"]
    if hurt == "header":
        content[header + 100] ^= 1
    else:
        content[header if hurt == "hole" else picture + 100 :] = bytes(len(content) - header)
        content += bytes(2**21)  # a download that has taken its room beforehand
    path.write_bytes(content)
    source = SA1B(sa1b)
    items = list(source.items("sa_000001"))
    assert [item.key for item in items[:-1]] == ["sa_11186", "sa_11187"]
    assert items[-1].cut_at == source.stamp("sa_000001") and "get it again" in items[-1].reason
    os.utime(path, (1, 1))
    assert source.stamp("sa_000001") != items[-1].cut_at  # the same size, got again


def test_tar_files_that_arrive_change_nobodys_share(sa1b):
    before = {part: rank for rank in range(3) for part in SA1B(sa1b).share(rank, 3)}
    for number in (0, 2, 3, 4):
        shutil.copy(sa1b / "sa_000001.tar", sa1b / f"sa_{number:06d}a.tar")
    after = {part: rank for rank in range(3) for part in SA1B(sa1b).share(rank, 3)}
    assert len(after) == 6 and set(after.values()) == {0, 1, 2} and before.items() <= after.items()


def test_what_cannot_be_read_just_now_costs_no_picture(tmp_path, monkeypatch):
    """An error of the disk made a picture one that cannot be read, for ever."""
    monkeypatch.setattr("nitro_e_lite.data.shard_files.PAUSES", (0.0,))
    path, honest, fails = tmp_path / "a.png", Path.read_bytes, [5, 5]
    path.write_bytes(encoded(photo(40, 40)))

    def read(one):
        if fails:
            raise OSError(fails.pop(), "Input/output error")
        return honest(one)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(Unusable, match=r"a.png: cannot be read \(Input/output error\); make it readable"):
        square(path, 32)
    fails.append(5)  # once: it is waited for
    assert square(path, 32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="picture is missing"):
        square(tmp_path / "none.png", 32)

    def no_room(*given):
        raise MemoryError

    monkeypatch.setattr("nitro_e_lite.data.sources.to_rgb", no_room)
    with pytest.raises(MemoryError):
        square(path, 32)


def test_a_tar_file_that_grows_while_it_is_read_is_cut_where_it_was(sa1b):
    """The size was asked for at the end: the rest of a download that had just finished was never read."""
    path = sa1b / "sa_000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    items = SA1B(sa1b).items("sa_000001")
    first = next(items)
    with path.open("ab") as file:
        file.write(whole[len(whole) // 2 :])
    rest = list(items)
    assert rest[-1].cut_at[0] == len(whole) // 2
    more = list(SA1B(sa1b).items("sa_000001", 1 + len(rest[:-1])))
    keys = [item.key for item in [first, *rest[:-1], *more]]
    assert keys == ["sa_11186", "sa_11187", "sa_11188", "sa_11189"]


def test_a_caption_that_cannot_be_read_just_now_stops_and_loses_nothing(sa1b, monkeypatch):
    """An error of the disk was once taken for the end of the tar file, and the rest of it was lost."""

    def fails(path, **options):
        if path.name == "sa_11187.txt":
            raise OSError(5, "Input/output error")
        return "a text"

    monkeypatch.setattr("pathlib.Path.read_text", fails)
    items = SA1B(sa1b).items("sa_000001")
    assert next(items).key == "sa_11186"
    with pytest.raises(OSError, match="Input/output error"):
        next(items)


def test_halves_of_surrogate_pairs_cost_one_item(tmp_path):
    r"""JSON may hold "\ud83d" alone, files may not: the encoder stopped at such a line for good."""
    lines = [
        {"file_name": "a.jpg", "text": "half an emoji \ud83d"},
        {"file_name": "b.jpg", "captions": ["half \ud83d", "whole \U0001f600"]},
        {"file_name": "\ud83d/../x", "text": "a"},
        {"file_name": ".", "text": "a"},
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    items = everything(Folder(tmp_path))
    assert [getattr(item, "reason", None) for item in items] == [
        "caption is no valid Unicode",
        None,
        "file_name is missing or leads out of the folder",
        "file_name is missing or leads out of the folder",
    ]
    assert items[1].captions == ["whole \U0001f600"] and items[2].key == r"\ud83d/../x"
    json.dumps([item.key for item in items], ensure_ascii=False).encode()  # as sidecars do


def test_sa1b_that_is_no_tar_at_all(sa1b):
    (sa1b / "sa_000001.tar").write_bytes(b"<html>URL signature expired</html>")
    (item,) = SA1B(sa1b).items("sa_000001")
    assert "tar file was cut short or damaged" in item.reason and "sa_000001.tar" in item.key


def test_sa1b_unpacked_and_captions_one_folder_deeper(sa1b):
    tarred = [item.key for item in everything(SA1B(sa1b))]
    for path in sorted(sa1b.glob("*.tar")):
        shutil.unpack_archive(path, path.with_suffix(""))  # its own "filter" needs Python 3.11.4, Debian 12 has 3.11.2
        path.unlink()
    (sa1b / "captions").rename(sa1b / "inner")
    (sa1b / "captions").mkdir()
    (sa1b / "inner").rename(sa1b / "captions" / "SA1B_caption")
    source = SA1B(sa1b)
    assert [item.key for item in everything(source)] == tarred
    assert len(problems(everything(source))) == 3
    check_positions(source)


def test_sa1b_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sa_"):
        SA1B(tmp_path)
    (tmp_path / "sa_000000").mkdir()
    with pytest.raises(FileNotFoundError, match="unpack SA1B_caption.tar.gz"):
        SA1B(tmp_path)


# JourneyDB


@pytest.fixture
def journeydb(tmp_path):
    """One archive of three, with the fields of the real annotation file."""
    train = tmp_path / "data" / "train"
    (train / "imgs" / "000").mkdir(parents=True)
    entries = []
    for k in range(6):
        name = f"{k:08x}-ünïcode-星.jpg"
        photo(70, 50 + k, seed=k).save(train / "imgs" / "000" / name)
        entry = {"img_path": f"./000/{name}", "prompt": f"a castle, 8k, octane render --ar 16:9 {k}"}
        entry |= {"Task1": {"Subject": "castle", "Style": "8k"}, "Task2": {"Caption": "A castle."}}
        entries.append(entry | {"Task3": {"Content": []}})
    entries[1]["prompt"] = ""
    del entries[2]["prompt"]
    entries[3]["img_path"] = "./000/gone.jpg"
    entries[4]["img_path"] = "../../../etc/passwd"
    lines = [json.dumps(entry, ensure_ascii=k % 2 == 0) for k, entry in enumerate(entries)]
    lines += [json.dumps({"img_path": f"./{k:03d}/x.jpg", "prompt": "p"}) for k in (17, 17, 199)]
    lines += ['{"img_path": "./000/', "[]"]
    (train / "train_anno_realease_repath.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("at", ["", "data/train", "data/train/train_anno_realease_repath.jsonl"])
def test_journeydb(journeydb, at):
    source = JourneyDB(journeydb / at)
    items = everything(source)
    assert len(items) == 11 and source.describe()["lines"] == 11
    good = [item for item in items if isinstance(item, Record)]
    assert [item.key for item in good] == [
        "000/00000000-ünïcode-星.jpg",
        "000/gone.jpg",
        "000/00000005-ünïcode-星.jpg",
    ]
    assert good[0].captions == ["a castle, 8k, octane render --ar 16:9 0"]
    assert square(good[0].image, 32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="picture is missing"):
        square(good[1].image, 32)
    reasons = [item.reason for item in items if isinstance(item, Problem)]
    assert reasons.count("caption is missing or empty") == 2 and reasons.count("archive was not downloaded") == 3
    assert reasons.count("line is no JSON object") == 2
    assert reasons.count("img_path is missing or leads out of the folder") == 1
    assert {item.key for item in items if "archive" in getattr(item, "reason", "")} == {"archive 017", "archive 199"}
    check_positions(source)


def test_journeydb_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_anno_realease_repath"):
        JourneyDB(tmp_path)
    (tmp_path / "train_anno.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match="unpack 000.tgz"):
        JourneyDB(tmp_path)


# your own folder


@pytest.fixture
def folder(tmp_path):
    lines = []
    for k in range(5):
        photo(50, 40, seed=k).save(tmp_path / f"bild {k} ä.png")
        lines.append({"file_name": f"bild {k} ä.png", "text": f"caption {k} – 星"})
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    photo().save(tmp_path / "nobody.webp")
    lines[1] = {"file_name": "bild 1 ä.png", "captions": ["one way", "", "another way"]}
    lines[2]["text"] = 5
    lines += [{"file_name": "broken.jpg", "text": "a"}, {"text": "no name"}, {"file_name": "/etc/hosts", "text": "a"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path


def test_own_folder(folder):
    source = Folder(folder)
    items = everything(source)
    assert items[0] == Record("bild 0 ä.png", folder / "bild 0 ä.png", ["caption 0 – 星"])
    assert items[1].captions == ["one way", "another way"]
    reasons = problems(items)
    assert reasons["bild 2 ä.png"] == "caption is missing or empty"
    assert reasons["None"] == reasons["/etc/hosts"] == "file_name is missing or leads out of the folder"
    assert reasons["nobody.webp"] == "no line in captions.jsonl names this picture"
    assert len(items) == 9 and len(reasons) == 4
    check_positions(source)


@pytest.mark.parametrize("blank", [b"", b"\n \r\n"])
def test_own_folder_with_byte_order_mark_blank_lines_and_another_encoding(tmp_path, blank, monkeypatch):
    """The mark once cost the first picture, and each blank line counted as a broken one."""
    monkeypatch.setattr("nitro_e_lite.data.sources.LINES", 3)
    names = [f"{k}.jpg" for k in range(4)]
    for name in names:
        photo().save(tmp_path / name)
    lines = [json.dumps({"file_name": name, "text": f"a\u2028{name}"}, ensure_ascii=False).encode() for name in names]
    lines[2] = b'{"file_name": "2.jpg", "text": "caf\xe9"}'
    (tmp_path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + blank + (b"\r\n" + blank).join(lines))
    source = Folder(tmp_path)
    items = everything(source)
    wrong = f"captions.jsonl, line {9 if blank else 3}"
    assert [item.key for item in items] == ["0.jpg", "1.jpg", wrong, "3.jpg", "2.jpg"]
    assert problems(items)[wrong] == "line is not UTF-8"
    assert items[0].captions == ["a\u20280.jpg"]
    check_positions(source)


def test_own_folder_passes_over_fields_that_are_null(tmp_path):
    lines = [
        {"file_name": "a.jpg", "text": None, "caption": "a red star"},
        {"file_name": None, "image": "b.jpg", "text": "a blue star"},
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [(item.key, item.captions) for item in everything(Folder(tmp_path))]
    assert found == [("a.jpg", ["a red star"]), ("b.jpg", ["a blue star"])]


def test_one_json_list_in_place_of_lines_is_refused(tmp_path):
    (tmp_path / "captions.jsonl").write_bytes(b'\xef\xbb\xbf[{"file_name": "a.jpg", "text": "a red star"}]\n')
    with pytest.raises(ValueError, match="captions.jsonl: is one JSON list; must hold one JSON object a line"):
        Folder(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_caption_or_prompt(sa1b, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (sa1b / "captions" / "sa_1.txt").write_bytes(b"\xef\xbb\xbfa red star\r\n")
    assert next(SA1B(sa1b).items("sa_000000")).captions == ["a red star"]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red star\r\na blue\xe2\x80\xa8star\r\n")
    items = everything(Prompts(tmp_path / "prompts.txt", pipeline, SETTINGS))
    assert [item.captions for item in items] == [["a red star"], ["a blue\u2028star"]]


def test_a_missing_picture_walks_through_no_tree(folder, monkeypatch):
    """Each process sorted all names of all folders when a single line named a missing file."""
    looked = []
    honest = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: looked.append(Path(place)) or honest(place))
    deep = folder / "some" / "deep"
    deep.mkdir(parents=True)
    (deep / unicodedata.normalize("NFD", "é.png")).write_bytes(encoded(photo(40, 40)))
    (folder / "captions.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": "x"}) + "\n" for name in ("none.png", "some\\deep\\é.png"))
    )
    missing, found = Folder(folder).items("lines-000000000")
    assert found.image == deep / unicodedata.normalize("NFD", "é.png") and missing.key == "none.png"
    assert set(looked) == {folder, folder / "some", deep}


def test_pictures_without_a_line_are_named_up_to_a_number(folder, monkeypatch):
    monkeypatch.setattr("nitro_e_lite.data.sources.NAMED", 2)
    for k in range(4):
        (folder / f"more {k}.png").write_bytes(b"")
    before, found = Folder(folder), list(Folder(folder).items("unlisted"))
    assert len(found) >= 4 and [item.key for item in found[2:]] == ["others"] * (len(found) - 2)
    assert [item.key for item in before.items("unlisted", 3)] == [item.key for item in found[3:]]


def test_lists_longer_than_a_part(folder, monkeypatch):
    monkeypatch.setattr("nitro_e_lite.data.sources.LINES", 3)
    source = Folder(folder)
    assert source.parts() == ["lines-000000000", "lines-000000003", "lines-000000006", "unlisted"]
    assert [item.key for item in source.items("lines-000000003")] == ["bild 3 ä.png", "bild 4 ä.png", "broken.jpg"]
    check_positions(source)


# prompts


@pytest.fixture(scope="module")
def pipeline():
    return build_tiny_flux()


SETTINGS = FLUX | {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}
PROMPTS = ["a red star", "a blue heart", "", "a red star", "two étoiles 星"]


@pytest.fixture(params=[".txt", ".jsonl", ".parquet"])
def prompts(request, tmp_path):
    import datasets

    path = tmp_path / f"prompts{request.param}"
    if request.param == ".txt":
        path.write_text("\n".join(PROMPTS) + "\n")
    else:
        rows = datasets.Dataset.from_dict({"prompt": PROMPTS, "prompt_nsfw": [0.0] * 5})
        rows.to_json(path) if request.param == ".jsonl" else rows.to_parquet(path)
    return path


def test_prompts_are_drawn(prompts, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = Prompts(prompts, pipeline, SETTINGS, batch=2)
    items = everything(source)
    assert [item.captions[0] for item in items if isinstance(item, Record)] == [PROMPTS[k] for k in (0, 1, 4)]
    assert problems(items) == {"prompt 2": "prompt is missing or empty", "prompt 3": "prompt was there before"}
    assert np.abs(np.asarray(items[0].image) - np.asarray(items[1].image).astype(int)).max() > 0
    if prompts.suffix == ".txt":  # a picture depends on its number alone
        other = Prompts(prompts, pipeline, SETTINGS, batch=3)
        (last,) = other.items(other.parts()[0], 4)
        assert np.abs(np.asarray(last.image).astype(int) - np.asarray(items[4].image)).max() <= 1


def test_prompts_of_a_folder_are_one_list_and_another_list_is_another_source(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "b.txt").write_text("a blue heart\na red star\n")
    (folder / "a.txt").write_text("a red star\n")
    (folder / "README.md").write_text("not a list of prompts")
    source = Prompts(folder, pipeline, SETTINGS)
    items = everything(source)
    assert [item.captions[0] for item in items if isinstance(item, Record)] == ["a red star", "a blue heart"]
    assert problems(items) == {"prompt 2": "prompt was there before"}
    (folder / "b.txt").write_text("a blue heart\na red cross\n")
    assert Prompts(folder, pipeline, SETTINGS).describe()["digest"] != source.describe()["digest"]
    (folder / "c.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="or a folder of one kind"):
        Prompts(folder, pipeline, SETTINGS)


def test_overflowed_pictures_are_problems(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "p.txt").write_text("a red star\n")
    broken = build_tiny_flux()
    broken.transformer.proj_out.weight.data.fill_(float("nan"))
    (item,) = everything(Prompts(tmp_path / "p.txt", broken, SETTINGS))
    assert "overflowed" in item.reason


def test_prompt_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"must be a file that ends in \.txt"):
        Prompts(tmp_path / "p.csv", None, {})
    (tmp_path / "p.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(ValueError, match="has words, none of prompt"):
        Prompts(tmp_path / "p.jsonl", None, {})


def test_a_name_that_is_not_utf_8_costs_one_item_and_not_the_tar(tmp_path):
    """Its name could not be written into the JSON file of the shard, which ended the whole part."""
    (tmp_path / "captions").mkdir()
    picture, names = encoded(Image.new("RGB", (64, 64))), [b"sa_1", b"sa_\xe9", b"sa_\xff", b"sa_3"]
    with tarfile.open(tmp_path / "sa_000000.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(os.fsdecode(name) + ".jpg")
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    for name in (names[0], names[1], names[3]):
        (tmp_path / "captions" / os.fsdecode(name + b".txt")).write_text("a caption")
    items = list(SA1B(tmp_path).items("sa_000000"))
    json.dumps([item.key for item in items], ensure_ascii=False).encode()
    assert [item.key for item in items] == ["sa_1", r"sa_\udce9", r"sa_\udcff", "sa_3"]
    assert [type(item) for item in items] == [Record, Record, Problem, Record]
