"""GenEval-lite: does the picture show what the caption says?

GenEval asks a text-to-image model for things that can be checked one by one: an object, two objects, a number
of objects, a colour, a position, two colours that must not be swapped. GenEval-lite asks the same six
questions about the scenes of this course. A prompt lists what must be seen; the verifier lists what is seen;
the answer is right only when both lists agree *exactly*: the same objects, nothing more, nothing of unknown
shape. The score is the mean of the six category means, so that no category counts more because it has more
prompts, with a bootstrap interval over prompts.

Two prompt lists, both drawn from the caption grammar, the same on every machine:

* `held_out_prompts`: compositions the training data contains, in sentences it never contains.
* `held_out_compositions`: shape-colour pairs and shape pairs that were never drawn in training.

`training_prompt` draws more of the first kind in other sentences, for training by rewards.

Sizes are never asked for, because the verifier does not judge them.

Differs: GenEval lets several relations hold at once and wants distances relative to box sizes; here "left of"
means: the centre is at least `POSITION_MARGIN` of the image further left, and further left than it is up or
down.

Source: Ghosh et al., GenEval, 2023: categories, metadata schema, mean of category means.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations
from pathlib import Path

import numpy as np

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.scenes import captions, grammar
from nitro_e_lite.scenes.grammar import COLORS, COUNT_WORDS, RELATIONS, SHAPES, SIZES, Scene, SceneObject, Stream
from nitro_e_lite.scenes.verifier import UNKNOWN, Detection, detect

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("held_out_prompts", "held_out_compositions")
PROMPTS_PER_CATEGORY = {"held_out_prompts": 50, "held_out_compositions": 24}
POSITION_MARGIN = 0.1  # fraction of the image; scenes that state a relation keep more, `grammar.RELATION_MARGIN`
MOST_OBJECTS = 8  # of a prompt; `judge` tries every order of them
RESAMPLES = 2000  # of the bootstrap interval
_SPATIAL = frozenset("left right above over below under underneath higher lower top bottom".split())
_SEED = 20
_TRAINING = 21  # names the stream of training prompts


@dataclass(frozen=True)
class Prompt:
    """What to show, in words and as a list.

    Attributes:
        text: the caption.
        tag: one of `CATEGORIES`.
        objects: (shape, colour) of every object; colour None means any.
        relation: when given, `objects[0]` stands in this relation to `objects[1]`.
    """

    text: str
    tag: str
    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None

    def __post_init__(self):
        if self.tag not in CATEGORIES:
            raise InvalidValue(f"tag={self.tag!r}: must be one of {', '.join(CATEGORIES)}")
        if not self.objects:
            raise InvalidValue("objects=(): a prompt must ask for at least one object")
        for shape, color in self.objects:
            if shape not in SHAPES or not (color is None or color in COLORS):
                raise InvalidValue(f"objects: ({shape!r}, {color!r}): unknown; the colour may be None")
        if self.relation is None:
            return
        if self.relation not in RELATIONS or len(self.objects) != 2 or self.objects[0] == self.objects[1]:
            rule = f"must be one of {', '.join(RELATIONS)}, between two different objects"
            raise InvalidValue(f"relation={self.relation!r} of {self.objects}: {rule}")

    def metadata(self) -> dict:
        """The prompt in GenEval's own schema: `tag`, `include`, `exclude` and `prompt`."""
        counts = Counter(reversed(self.objects) if self.relation else self.objects)
        include = [
            {"class": shape, "count": count} | ({"color": color} if color else {})
            for (shape, color), count in counts.items()
        ]
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        counting = include if self.tag == "counting" else []
        exclude = [{"class": i["class"], "count": i["count"] + 1} for i in counting]
        return {"tag": self.tag, "include": include, "exclude": exclude, "prompt": self.text}

    @classmethod
    def from_metadata(cls, entry: dict) -> Prompt:
        """The inverse of `metadata`, for prompts about the course's shapes and colours.

        Raises:
            ValueError: when a key is missing, or a shape, colour, tag or relation is unknown.
        """
        try:
            items = [((i["class"], i.get("color")), operator.index(i["count"])) for i in entry["include"]]
            relation = next((i["position"][0] for i in entry["include"] if i.get("position")), None)
            text, tag = entry["prompt"], entry["tag"]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise InvalidValue(f"{entry!r}: needs prompt, tag, include with class and count") from error
        said = [text, tag, *(word for (shape, color), _ in items for word in (shape, color or ""))]
        if not all(isinstance(word, str) for word in [*said, relation or ""]):
            raise InvalidValue(f"{entry!r}: prompt, tag, class, color and relation must be strings")
        if sum(count for _, count in items) > MOST_OBJECTS:
            raise InvalidValue(f"{entry!r}: asks for more than {MOST_OBJECTS} objects")
        objects = [spec for spec, count in items for _ in range(count)]
        return cls(text, tag, tuple(reversed(objects) if relation else objects), relation)


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its prompt and why not: a reason opens with count, shape, color or position."""

    correct: bool
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """GenEval-lite result, plain JSON by `dataclasses.asdict`; `low` to `high` is the 95 % interval."""

    overall: float
    low: float
    high: float
    categories: dict[str, float]
    images: int


# ------------------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------------------


def load_prompts(split: str = "held_out_prompts") -> list[Prompt]:
    """The fixed prompt list of a split, category by category.

    Args:
        split: `"held_out_prompts"` (50 for each of six categories) or `"held_out_compositions"` (24 for
            each of the four categories that name two shapes or a colour).

    Raises:
        ValueError: for another split.
    """
    if split not in SPLITS:
        raise InvalidValue(f"split={split!r}: must be one of {', '.join(SPLITS)}")
    return list(_prompts(split))


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from a JSON-lines file in GenEval's metadata schema, one `Prompt.metadata()` a line.

    Raises:
        ValueError: for an empty file, or naming the line that is not such a prompt.
    """
    prompts = list(read_jsonl(path, torn_last_line="counts", parse=Prompt.from_metadata))
    if not prompts:
        raise InvalidValue(f"{path}: no prompts, must hold one JSON object a line")
    return prompts


@cache
def _prompts(split: str) -> tuple[Prompt, ...]:
    held_out = split == "held_out_compositions"
    prompts: dict[str, Prompt] = {}  # by text
    for tag in CATEGORIES:
        if held_out and tag in ("single_object", "counting"):
            continue
        for slot in range(PROMPTS_PER_CATEGORY[split]):
            prompt = _new_prompt(tag, slot, held_out, prompts)
            prompts[prompt.text] = prompt
    return tuple(prompts.values())


def _new_prompt(tag: str, slot: int, held_out: bool, taken: dict[str, Prompt]) -> Prompt:
    """The prompt of one place in the list, in words that are reserved and not taken."""
    category = CATEGORIES.index(tag)
    for turn in range(1000):  # a turn fails when every sentence about its objects is taken
        objects, relation = _compose(tag, slot + turn, held_out, Stream(_SEED, category, slot, turn))
        scene = Scene(_kind(tag), _placeholders(objects), None, relation)
        for attempt in range(400):
            text = captions.describe(scene, Stream(_SEED, category, slot, turn, attempt, held_out))
            if text not in taken and captions.is_reserved(text) and _says_no_more(text, tag, objects, relation):
                return Prompt(text, tag, objects, relation)
    raise RuntimeError(f"no prompt left for {tag}")  # the grammar would have to shrink


def training_prompt(tag: str, *keys: int) -> Prompt:
    """A prompt to train on: never a reserved sentence, never a held-out composition, and nothing but what is asked for.

    Args:
        tag: one of `CATEGORIES`.
        *keys: integers that name it; equal ones give the same prompt on every machine.

    Raises:
        ValueError: for another tag.
    """
    if tag not in CATEGORIES:
        raise InvalidValue(f"tag={tag!r}: must be one of {', '.join(CATEGORIES)}")
    name = (_TRAINING, CATEGORIES.index(tag), *keys)
    stream = Stream(*name)
    objects, relation = _compose(tag, int(stream.random() * 720), False, stream)
    scene = Scene(_kind(tag), _placeholders(objects), None, relation)
    for attempt in range(1000):
        text = captions.describe(scene, Stream(*name, attempt))
        if not captions.is_reserved(text) and _says_no_more(text, tag, objects, relation):
            return Prompt(text, tag, objects, relation)
    raise RuntimeError(f"no training prompt for {tag} {keys}")  # the grammar would have to shrink


def prompt_of(scene: Scene, text: str) -> Prompt | None:
    """What a training caption asks for; None where the categories have no word for it.

    Args:
        scene: what `text` is a caption of.
        text: of `captions.caption`.
    """
    said, kind = set(captions.words(text)), scene.kind
    colored, related = bool(said & COLORS.keys()), bool(said & _SPATIAL and scene.relation)
    tags = {"single": "colors" if colored else "single_object", "count": "counting"}
    tags["pair"] = "position" if related else "color_attr" if colored else "two_object"
    if kind not in tags:
        return None
    objects = tuple((one.shape, one.color if colored else None) for one in scene.objects)
    return Prompt(text, tags[kind], objects, scene.relation if kind == "pair" and related else None)


def _says_no_more(text: str, tag: str, objects, relation: str | None) -> bool:
    """Whether a sentence states colours and a relation exactly where they are asked for, and no size."""
    said = set(captions.words(text))
    return (
        not said & SIZES.keys()  # the verifier does not judge sizes
        and bool(said & COLORS.keys()) == (objects[0][1] is not None)
        and bool(said & _SPATIAL) == (relation is not None)
        and (tag == "single_object" or not text.endswith(" in the picture"))
    )


def _compose(tag: str, slot: int, held_out: bool, stream: Stream):
    """Objects and relation of a prompt; the slot number balances shapes, counts, pairs and relations."""
    relation = RELATIONS[slot // 2 % 4] if tag == "position" else None
    if tag == "single_object":
        return ((SHAPES[slot % 6], None),), relation
    if tag == "colors":
        kinds = [(s, c) for c in COLORS for s in SHAPES if ((s, c) in grammar.HELD_OUT_OBJECTS) == held_out]
        return (kinds[slot * 17 % len(kinds)],), relation  # 17: a stride that meets every kind
    if tag == "counting":
        shape, number = SHAPES[slot % 6], tuple(COUNT_WORDS)[1 + slot // 6 % 3]
        colors = [c for c in COLORS if (shape, c) not in grammar.HELD_OUT_OBJECTS]
        color = stream.choice(colors) if stream.random() < 1 / 3 else None
        return ((shape, color),) * number, relation
    new_pair = held_out and (tag == "two_object" or slot % 2 == 0)  # else the novelty is in a colour
    pairs = [p for p in combinations(SHAPES, 2) if (frozenset(p) in grammar.HELD_OUT_SHAPE_PAIRS) == new_pair]
    names = sorted(pairs[slot * 5 % len(pairs)], key=lambda _: stream.random())
    colored = tag == "color_attr" or (tag == "position" and stream.random() < 0.75) or held_out != new_pair
    while True:
        colors = [stream.choice(tuple(COLORS)) if colored else None for _ in names]
        objects = tuple(zip(names, colors, strict=True))
        if grammar.is_held_out(_placeholders(objects)) == held_out and (not colored or colors[0] != colors[1]):
            return objects, relation


def _placeholders(objects) -> tuple[SceneObject, ...]:
    """Scene objects of these shapes and colours, to be described; size and place mean nothing."""
    return tuple(SceneObject(s, c, "medium", 0.5, 0.5, 0.1, 0.0, (0, 0, 0)) for s, c in objects)


def _kind(tag: str) -> str:
    return {"single_object": "single", "colors": "single", "counting": "count"}.get(tag, "pair")


def true_scene(prompt: Prompt, seed: int = 0) -> Scene:
    """A scene that shows the prompt; what it leaves open (places, sizes, colours) is drawn from `seed`."""
    name = int.from_bytes(hashlib.blake2b(prompt.text.encode(), digest_size=8).digest(), "big")
    sizes = ("small", "medium", "large") if len(prompt.objects) < 3 else ("small", "medium")
    for attempt in range(1000):
        stream = Stream(name, seed, attempt)
        alike = stream.choice(tuple(COLORS)), stream.choice(sizes)
        specs = [
            (shape, color or alike[0], alike[1])
            if prompt.tag == "counting"
            else (shape, color or stream.choice(tuple(COLORS)), stream.choice(sizes))
            for shape, color in prompt.objects
        ]
        objects = grammar.place(specs, stream, prompt.relation)
        if objects is not None:
            return Scene(_kind(prompt.tag), objects, grammar.draw_background(stream), prompt.relation)
    raise InvalidValue(f"prompt={prompt.text!r}: no room for {len(prompt.objects)} objects")


# ------------------------------------------------------------------------------------------------------------
# Judging
# ------------------------------------------------------------------------------------------------------------


def verify(image: np.ndarray, prompt: Prompt) -> Verdict:
    """Whether a picture shows exactly what the prompt asks for.

    Args:
        image: uint8 (H, W, 3), RGB, sides >= 64.
        prompt: what to show.
    """
    return judge(detect(image), prompt)


def judge(found: Sequence[Detection], prompt: Prompt) -> Verdict:
    """Like `verify`, for objects already detected."""
    seen = ", ".join(map(str, found)) or "nothing"
    if len(found) != len(prompt.objects):
        return Verdict(False, f"count: expected {len(prompt.objects)}, found {len(found)} ({seen})")
    if any(d.shape == UNKNOWN for d in found):
        return Verdict(False, f"shape: something of unknown shape ({seen})")
    if Counter(d.shape for d in found) != Counter(shape for shape, _ in prompt.objects):
        return Verdict(False, f"shape: found {seen}")
    matches = [
        order
        for order in permutations(found)
        if all(d.shape == s and c in (None, d.color) for d, (s, c) in zip(order, prompt.objects, strict=True))
    ]
    if not matches:
        return Verdict(False, f"color: found {seen}")
    if prompt.relation and not any(stands(a, prompt.relation, b) for a, b in matches):
        a, b = matches[0]
        return Verdict(False, f"position: {a} at ({a.x:.2f}, {a.y:.2f}), {b} at ({b.x:.2f}, {b.y:.2f})")
    return Verdict(True)


def stands(first, relation: str, second) -> bool:
    """Whether `first` is `relation` of `second`: anything with `.x`, `.y` as fractions, y down."""
    dx, dy = second.x - first.x, second.y - first.y
    axes = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}
    along, across = axes[relation]
    return along >= POSITION_MARGIN and along > abs(across)


def score(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> Score:
    """The mean of the category means and its 95 % bootstrap interval.

    Prompts are resampled within their category, with all their images: images of one prompt are alike.

    Args:
        prompts: the prompt of each image; a prompt with several images is listed several times.
        verdicts: the verdict of each image.

    Raises:
        ValueError: when the lists are empty or of different lengths.
    """
    if len(prompts) != len(verdicts) or not prompts:
        raise InvalidValue(f"{len(prompts)} prompts, {len(verdicts)} verdicts: must be equally many, > 0")
    results: dict[str, dict[Prompt, list[bool]]] = {}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        results.setdefault(prompt.tag, {}).setdefault(prompt, []).append(bool(verdict.correct))
    generator = np.random.default_rng(0)
    means, samples = {}, []
    for tag in sorted(results, key=CATEGORIES.index):
        rate = np.array([np.mean(r) for r in results[tag].values()])  # (prompts,)
        means[tag] = float(rate.mean())
        samples.append(rate[generator.integers(len(rate), size=(RESAMPLES, len(rate)))].mean(1))
    low, high = np.quantile(np.mean(samples, 0), (0.025, 0.975))
    return Score(float(np.mean(list(means.values()))), float(low), float(high), means, len(prompts))
