"""The data cards: valid for the Hugging Face hub, complete, honest about the code they describe."""

import re
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from nitro_e_lite import scenes
from nitro_e_lite.config import preset

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
    for kind, share in scenes.KINDS.items():
        assert f"| {kind} | {share:.2f} |" in text
    assert (len(scenes.SHAPES), len(scenes.COLORS), len(scenes.SIZES)) == (6, 10, 3)
    assert "Six shapes" in text and "ten colours" in text and "three sizes" in text
    flat = " ".join(text.split())
    for shape, color in scenes.HELD_OUT_OBJECTS:
        assert f"{color} {shape}" in flat
    for pair in scenes.HELD_OUT_SHAPE_PAIRS:
        first, second = pair
        assert f"{first} with {second}" in flat or f"{second} with {first}" in flat
    assert scenes.RESERVED_FRACTION == 4 and "one caption string in four" in flat
    assert len(scenes.vocabulary()) < 100
    data = preset("base", "lite").data
    assert f"{data.scenes:,} scenes of seed {data.seed}" in flat and f"{data.captions} captions each" in flat
