"""Result cards: the only source of tables.

A card is a JSON file that one command wrote: what came out, and all that it depends on. `check` refuses one that lacks
a part of its recipe, or was made from fewer pictures than its benchmark has: the official tools print a mean of
whatever they found, and a score of 544 prompts is not comparable with one of 553.

`cards/` holds those of this repository. Kinds are in `KINDS`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nitro_e_lite import runtime
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation.appearance import check_report, kept_diversity
from nitro_e_lite.files import read_json, write_atomically
from nitro_e_lite.scenes.geneval import Prompt
from nitro_e_lite.scenes.verifier import VERSION
from nitro_e_lite.stats import paired_interval

FOLDER = Path(__file__).with_suffix("")
RECIPE = ("weights_sha256", "sampler", "steps", "guidance", "seeds", "environment")  # of every score of a model
LITE = ("model", "prompt_list", "sigma_grid", "shift", "dtype")
KINDS: dict[str, tuple[str, ...]] = {
    "geneval_lite": (*RECIPE, *LITE, "overall", "low", "high", "categories", "verifier"),
    "geneval": (*RECIPE, "overall", "categories"),
    "dpg": (*RECIPE, "overall"),
    "hpsv2": (*RECIPE, "overall", "categories"),
    "image_reward": (*RECIPE, "overall"),
    "fid": (*RECIPE, "overall", "tool", "resize", "export_resize"),
    "peers": ("rows", "environment"),
    "speed": ("rows", "environment"),
    "fp8_speed": ("rows", "environment"),
    "drawing": ("rows", "environment"),
    "chain": ("rows", "preset", "machines", "environment"),
    "reading": ("rows", "decoding", "environment"),
    "counts": ("rows", "environment"),
}
"""Kind -> what a card of it must hold besides `command`."""
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("command", "sampler", "prompt_list", "model", "verdicts"), str),
    **dict.fromkeys(("steps", "images", "images_expected", "prompts"), int),
    **dict.fromkeys(("guidance", "shift", "overall", "low", "high"), (int, float)),
    **dict.fromkeys(("categories", "environment", "values", "appearance"), dict),
    "seeds": list,
    "tags": list,
    "rows": (dict, list),
}
"""Field -> what it is in every card that has it."""
PICTURES = {"geneval": 2212, "dpg": 1065, "hpsv2": 3200}
"""Benchmark -> pictures (for DPG: files of four), when it is complete."""
PROMPTS = {"held_out_prompts": 300, "held_out_compositions": 96}


def command_line(words: Sequence[str]) -> str:
    """`nitro-e ...` as it was typed, without the places of its output, which are this machine's."""
    places, kept, skip = ("--out", "--grid", "--review"), ["nitro-e"], False
    for word in words:
        if not skip and word != "--json" and word.partition("=")[0] not in places:
            kept.append(word)
        skip = word in places
    return " ".join(kept)


def check(card: Mapping[str, Any], name: str = "card") -> None:
    """Refuses a card from which no table may be made.

    Raises:
        ValueError: an unknown kind, a missing part of the recipe or one of another type, a wrong number of pictures or
            verdicts, a score out of its range, or another version of the verifier; the first thing wrong is named.
    """
    kind = card.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidValue(f"{name}: kind {kind!r} is not one of {', '.join(KINDS)}")
    missing = [field for field in ("command", *KINDS[kind]) if card.get(field) in (None, "", [], {})]
    if missing:
        raise InvalidValue(f"{name}: lacks {', '.join(missing)}")
    for field in TYPES.keys() & card.keys():
        if not isinstance(card[field], TYPES[field]):
            raise InvalidValue(f"{name}: {field}={card[field]!r:.80} is of another type than in other cards")
    if "weights_sha256" not in KINDS[kind]:
        return
    expected, found = card.get("images_expected"), card.get("images")
    wanted = _complete(card) or expected
    if not found == expected == wanted:
        raise InvalidValue(f"{name}: made from {found} pictures, {expected} asked for; {kind} has {wanted}")
    if kind == "geneval_lite":
        if card["verifier"] != VERSION:
            raise InvalidValue(f"{name}: judged by version {card['verifier']} of the verifier, this is {VERSION}")
        if not 0 <= card["low"] <= card["overall"] <= card["high"] <= 1:
            raise InvalidValue(f"{name}: {card['low']} to {card['high']} is no interval around {card['overall']}")
        verdicts = card.get("verdicts", "")
        if set(verdicts) - {"0", "1"} or len(verdicts) not in (0, found):
            raise InvalidValue(f"{name}: verdicts must be a 0 or 1 for each of {found} pictures, or left out")
        if len(card.get("tags", ())) not in (0, card.get("prompts")):
            raise InvalidValue(f"{name}: tags must be one for each of {card.get('prompts')} prompts, or left out")
        if "appearance" in card:
            check_report(card["appearance"], f"{name}: appearance", card.get("prompts"))


def _complete(card: Mapping[str, Any]) -> int | None:
    """How many pictures a complete run has; None when that depends on a list of the user's own."""
    if card["kind"] == "geneval_lite" and card.get("prompt_list") in PROMPTS:
        return PROMPTS[card["prompt_list"]] * len(card["seeds"])
    return PICTURES.get(card["kind"])


def write(path: str | Path, kind: str, values: Mapping[str, Any], command: str) -> Path:
    """Writes a card, checked.

    Raises:
        ValueError: see `check`.
    """
    path = Path(path)
    card = {"kind": kind, "command": command, "environment": runtime.environment_report()} | dict(values)
    check(card, path.name)
    write_atomically(path, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return path


def load(folder: str | Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The cards of a folder by name, each checked.

    Raises:
        ValueError: see `check`.
    """
    found = {path.stem: read_json(path) for path in sorted(Path(folder).glob("*.json"))}
    for name, card in found.items():
        check(card, name)
    return found


def lookup(cards: Mapping[str, Any], path: str) -> Any:
    """What stands at `card.field.field`; a number is a place in a list, `name=value` the entry of a list that says so.

    Raises:
        ValueError: there is no such card, field or entry.
    """
    found: Any = cards
    for key in path.split("."):
        try:
            if isinstance(found, Mapping):
                found = found[key]
            elif "=" in key:
                name, _, value = key.partition("=")
                found = next(entry for entry in found if str(entry[name]) == value)
            else:
                found = found[int(key)]
        except (KeyError, IndexError, ValueError, TypeError, StopIteration):
            raise InvalidValue(f"{path}: there is no card or field {key!r}") from None
    return found


PLACE = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")


def fill(text: str, cards: Mapping[str, Any]) -> str:
    """A text whose `{card.field:format}` are replaced by what the cards say, see `lookup`; shares as "5.6 %"."""

    def told(place: re.Match) -> str:
        return re.sub("%$", " %", format(lookup(cards, place[1]), place[2] or ""))

    return PLACE.sub(told, text)


def can_fill(text: str, cards: Mapping[str, Any]) -> bool:
    """Whether all that a text for `fill` names is there."""
    try:
        fill(text, cards)
    except InvalidValue:
        return False
    return True


def fingerprint(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name -> hash of the contents: what a figure was made from."""
    text = {name: json.dumps(card, sort_keys=True) for name, card in cards.items()}
    return {name: hashlib.sha256(one.encode()).hexdigest()[:12] for name, one in text.items()}


def own_list(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a card says of a list that is not this project's: by its file's name alone nobody knows it again."""
    text = json.dumps([prompt.metadata() for prompt in prompts])
    return {"prompts_sha256": hashlib.sha256(text.encode()).hexdigest(), "tags": [prompt.tag for prompt in prompts]}


def same_pictures(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Refuses to compare two GenEval-lite cards that are not about the same pictures; one may go on with further seeds.

    Raises:
        ValueError: cards of other prompts, seeds or verifiers, or without verdicts.
    """
    for name in ("prompt_list", "verifier", "prompts"):
        if first.get(name) != second.get(name):
            raise InvalidValue(f"cards: {name} differs, {first.get(name)} and {second.get(name)}")
    seeds = first["seeds"], second["seeds"]
    if any(one != other for one, other in zip(*seeds, strict=False)):  # as far as both go
        raise InvalidValue(f"cards: seeds differs, {seeds[0]} and {seeds[1]}")
    both = [card["prompts_sha256"] for card in (first, second) if "prompts_sha256" in card]
    if len(set(both)) == 2:
        raise InvalidValue(f"cards: both are about {first['prompt_list']}, but the prompts in it differ")
    if not first.get("verdicts") or not second.get("verdicts"):
        raise InvalidValue("cards: one has no verdicts; evaluate again")


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[float, float, float]:
    """Difference of two GenEval-lite scores on the pictures of both, picture by picture, with its 95 % interval.

    Both are means over categories. The lists of this project have equally many prompts of each; a card about another
    list says which category each prompt is of.

    Raises:
        ValueError: see `same_pictures`.
    """
    same_pictures(first, second)
    both = zip(first["verdicts"], second["verdicts"], strict=False)
    right = [[float(mark) for mark in marks] for marks in zip(*both, strict=True)]
    prompts = [k % first["prompts"] for k in range(len(right[0]))]
    tags = first.get("tags")
    return paired_interval(*right, prompts, [tags[k] for k in prompts] if tags else None)


def difference(card: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of another model on the same pictures: `score` (mean, low, high), shares of pictures that only
    this one got right (`won`) or only the other (`lost`: all that a switch between the two could win back) and, where
    both know how alike their pictures are, `diversity`, the share that is kept of the other's.

    Raises:
        ValueError: see `same_pictures`.
    """
    recipe = ("model", "weights_sha256", "steps", "guidance", "shift", "dtype")
    told = {name: other.get(name) for name in recipe} | {"fp8": bool(other.get("fp8"))}
    told["score"] = list(compare(card, other))
    pairs = list(zip(card["verdicts"], other["verdicts"], strict=False))
    told |= {name: pairs.count(pair) / len(pairs) for name, pair in (("won", ("1", "0")), ("lost", ("0", "1")))}
    if card.get("appearance") and other.get("appearance") and card["seeds"] == other["seeds"]:
        told["diversity"] = kept_diversity(card["appearance"], other["appearance"])
    return told
