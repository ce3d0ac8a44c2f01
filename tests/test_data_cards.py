"""The data cards: valid for the Hugging Face hub, complete, honest about the code they describe."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from huggingface_hub import DatasetCard

from nitro_e_lite.cli.app import app
from nitro_e_lite.data.precompute import SOURCES
from nitro_e_lite.data.sources import Prompts
from nitro_e_lite.presets import preset
from nitro_e_lite.scenes import captions, grammar

FOLDER = Path(__file__).resolve().parents[1] / "data_cards"
NAMES = ("synthetic_scenes", "sa1b", "journeydb", "fluxdb", "nitro_e_25m")
SECTIONS = [
    "Source",
    "Size",
    "Licence",
    "How it is captioned",
    "Filters",
    "Known harms",
    "How to get it",
    "1 % recipe",
    "Citation",
]
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
CREATORS = {"found", "crowdsourced", "expert-generated", "machine-generated", "no-annotation", "other"}


def load(name: str) -> DatasetCard:
    return DatasetCard.load(FOLDER / f"{name}.md")


def test_there_is_a_card_for_every_source_and_no_other():
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_header_is_one_the_hub_accepts(name):
    data = load(name).data
    assert data.pretty_name and data.language == ["en"] and data.task_categories == ["text-to-image"]
    assert len(data.size_categories) == 1 and data.size_categories[0] in SIZES
    assert set(data.annotations_creators) <= CREATORS and set(data.language_creators) <= CREATORS
    assert data.source_datasets
    known = data.license == "mit"
    assert known or (data.license == "other" and data.license_name and data.license_link.startswith("https://"))
    assert not known or "license_name" not in data.to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_card_says_everything_in_the_same_order(name):
    headings = re.findall(r"^## (.+)$", load(name).text, flags=re.MULTILINE)
    assert len(headings) == len(SECTIONS)
    for heading, wanted in zip(headings, SECTIONS, strict=True):
        assert heading.startswith(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_local_links_lead_somewhere(name):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", load(name).text)
    missing = [target for target in targets if not (FOLDER / target).exists()]
    assert not missing


def commands(name: str) -> list[list[str]]:
    """The words of every `nitro-e` command of a card, whichever way it is started."""
    blocks = re.findall(r"```bash\n(.*?)```", load(name).text, flags=re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")  # a command may go on in the next line
    lines = re.findall(r"^(?:nitro-e|torchrun .* -m nitro_e_lite\.cli) (.+)$", text, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", NAMES[1:])
def test_commands_of_the_cards_exist(name):
    assert commands(name)
    for words in commands(name):
        found = typer.main.get_command(app)
        while words and words[0] in getattr(found, "commands", {}):
            found = found.commands[words.pop(0)]
        assert not hasattr(found, "commands"), f"{words} names no command"
        options = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("name", sorted({*SOURCES, Prompts.kind} - {"folder"}))
def test_every_kind_that_can_be_encoded_has_its_command_and_gate_in_its_card(name):
    assert any(words[:3] == ["data", "encode", name] for words in commands(name))
    assert "**gate**" in load(name).text.lower() and "expire" in load("sa1b").text


def test_full_presets_read_the_folders_that_the_cards_write():
    encode = [words for name in NAMES for words in commands(name) if words[:2] == ["data", "encode"]]
    written = {words[4] for words in encode}
    larger = [words for words in encode if "--size" in words]  # read by a stage without REPA
    repa = preset("base", "full").repa
    assert repa.weight > 0  # so every folder that stage 1 may read needs vision features
    assert all("--text" in words for words in encode)
    assert all(words[words.index("--vision") + 1] == repa.vision for words in encode if words not in larger)
    assert larger and all(words[words.index("--size") + 1] == "1024" and "--vision" not in words for words in larger)
    for stage in ("base", "finetune", "1024px"):
        data = preset(stage, "full").data
        assert {*data.folders, *data.validation_folders} <= written


def test_counts_of_the_parts_add_up_to_the_mix():
    rows = re.findall(r"^\| (SA-1B|JourneyDB|FLUXDB) \| ([\d.]+)M .* (yes|no) \| \[", load("nitro_e_25m").text, re.M)
    pictures = {name: (float(count), stage_2 == "yes") for name, count, stage_2 in rows}
    assert pictures == {"SA-1B": (11.1, False), "JourneyDB": (4.4, True), "FLUXDB": (9.5, True)}
    assert sum(count for count, _ in pictures.values()) == pytest.approx(25.0)
    assert sum(count for count, kept in pictures.values() if kept) == pytest.approx(13.9)
    for name, (count, _) in pictures.items():
        card = load(name.replace("-", "").lower())
        assert str(count) in card.text
        low, high = ({"1M<n<10M": (1, 10), "10M<n<100M": (10, 100)})[card.data.size_categories[0]]
        assert low <= count <= high


@pytest.mark.parametrize("name, millions", [("sa1b", 11.1), ("journeydb", 4.4), ("fluxdb", 9.5)])
def test_disk_space_of_the_latents_is_the_product(name, millions):
    gigabytes = millions * 1e6 * 32 * 16 * 16 * 2 / 1e9
    assert f"{gigabytes:.0f} GB" in load(name).text


def test_card_of_the_scenes_agrees_with_the_code():
    text = load("synthetic_scenes").text
    for kind, share in grammar.KINDS.items():
        assert f"| {kind} | {share:.2f} |" in text
    assert (len(grammar.SHAPES), len(grammar.COLORS), len(grammar.SIZES)) == (6, 10, 3)
    assert "Six shapes" in text and "ten colours" in text and "three sizes" in text
    flat = " ".join(text.split())
    for shape, color in grammar.HELD_OUT_OBJECTS:
        assert f"{color} {shape}" in flat
    for pair in grammar.HELD_OUT_SHAPE_PAIRS:
        first, second = pair
        assert f"{first} with {second}" in flat or f"{second} with {first}" in flat
    assert captions.RESERVED_ONE_IN == 4 and "one caption string in four" in flat
    assert len(captions.vocabulary()) < 100
    data = preset("base", "lite").data
    assert f"{data.scenes:,} scenes of seed {data.seed}" in flat and f"{data.captions} captions each" in flat
