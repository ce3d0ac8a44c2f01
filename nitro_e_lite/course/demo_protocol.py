"""What the pages of the demo and the process that draws say to each other, and the limits both hold to.

A page lives in a kernel of its own, one for each visitor, and must be there at once: nothing here imports torch. One
worker draws for all. Between them runs a loopback socket; both ends prove that they know a key before anything else is
read, and messages are JSON, because a page repeats what strangers have typed.

What is compared is a list of *lanes*: a model, how many steps it takes and how strongly it is guided. Three lanes of
the best shipped model are the default; when distilled models ship, they take the places of four steps and of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing.connection as mpc
import os
import shlex
import socket
from dataclasses import dataclass
from typing import Any

from nitro_e_lite import files
from nitro_e_lite.errors import InvalidValue, NotWritten
from nitro_e_lite.scenes.captions import noun_phrase, plural
from nitro_e_lite.scenes.grammar import COUNT_WORDS

MAX_CAPTION = 200  # characters
MAX_STEPS = 50  # of a lane
MAX_GUIDANCE = 20.0
MAX_SEED = 2**32 - 1
MAX_LANES = 4
MAX_QUEUE = 32  # drawings that wait
MAX_PER_MINUTE = 20  # drawings of one visitor
IDLE_MINUTES = 10  # a page that nobody touches is put to sleep
MAX_MESSAGE = 64_000  # bytes that a page may send at once
LITE_VOCABULARY = 5000  # a tokenizer with fewer entries is one of this course, whose pictures the verifier can judge
ENVIRONMENT = "NITRO_E_DEMO"  # names the variable that tells a kernel where the worker is
SHIPPED = {20: "lite-grpo", 4: "lite-4step", 1: "lite-sprint"}  # who draws in so many steps, as soon as it ships


@dataclass(frozen=True)
class Lane:
    """One way to draw.

    Attributes:
        model: whatever `load_pipeline` takes.
        steps: sampler steps.
        guidance: None: what the page's dial says; a number: this lane's own, for models that were distilled with it.
    """

    model: str = "lite"
    steps: int = 20
    guidance: float | None = None

    def __post_init__(self):
        if not self.model.strip():
            raise InvalidValue("lane: the model has no name")
        _whole("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0.0, MAX_GUIDANCE)

    @property
    def name(self) -> str:
        """`4 steps`."""
        return f"{self.steps} step{'s' * (self.steps != 1)}"


def default_lanes(model: str = "lite") -> list[Lane]:
    """Twenty steps, four and one: of what was trained for so many where it ships, else of the best that ships."""
    lanes = []
    for steps, name in SHIPPED.items():
        name = next(
            (one for one in (name, files.BEST) if (files.weights_dir() / one / files.MANIFEST).is_file()), "lite"
        )
        if model == "lite" and name != "lite":
            about = (files.weights_dir() / name / "config.json").read_text(encoding="utf-8")
            lanes.append(Lane(name, steps, float(json.loads(about)["config"]["guidance"])))
        else:
            lanes.append(Lane(model, steps))
    return lanes


def parse_lane(text: str) -> Lane:
    """A lane as a person writes it: `MODEL@STEPS` or `MODEL@STEPS@GUIDANCE`, such as `lite@4` or `my-run@1@0`.

    Raises:
        ValueError: another form.
    """
    model, *numbers = text.rsplit("@", 2) if text.count("@") > 1 else text.rsplit("@", 1)
    try:
        steps, guidance = int(numbers[0]), [float(number) for number in numbers[1:]]
    except (IndexError, ValueError):
        raise InvalidValue(f"lane: {text!r} is not MODEL@STEPS or MODEL@STEPS@GUIDANCE, such as lite@4") from None
    return Lane(model, steps, *guidance)


@dataclass(frozen=True)
class Order:
    """What a visitor wants drawn.

    Attributes:
        caption: what to draw.
        seed: of the noise; every lane starts from the same.
        guidance: for the lanes without their own.
        steps: of each lane.
        race: lanes take turns step by step; else one after the other, the shortest first.
        prompt: what a built caption asks for, in GenEval's schema; None for free text, which has no verdict.
    """

    caption: str
    seed: int = 0
    guidance: float = 3.0
    steps: tuple[int, ...] = (20, 4, 1)
    race: bool = True
    prompt: dict[str, Any] | None = None

    def __post_init__(self):
        if not isinstance(self.caption, str) or not self.caption.strip():
            raise InvalidValue("Write a caption first, for example: two orange triangles.")
        if len(self.caption) > MAX_CAPTION:
            raise InvalidValue(f"The caption has {len(self.caption)} characters; {MAX_CAPTION} are read at most.")
        if not self.caption.isprintable():
            raise InvalidValue("The caption holds characters that cannot be printed; write it on one line.")
        _whole("seed", self.seed, 0, MAX_SEED)
        _number("guidance", self.guidance, 0.0, MAX_GUIDANCE)
        if not isinstance(self.steps, (list, tuple)) or not 1 <= len(self.steps) <= MAX_LANES:
            raise InvalidValue(f"steps: expected one number for each of 1 to {MAX_LANES} lanes")
        for steps in self.steps:
            _whole("steps", steps, 1, MAX_STEPS)
        if not isinstance(self.race, bool) or not isinstance(self.prompt, dict | None):
            raise InvalidValue("race, prompt: expected true or false, and an object or nothing")
        object.__setattr__(self, "steps", tuple(self.steps))

    def guidance_of(self, lane: Lane) -> float:
        """How strongly a lane is guided."""
        return self.guidance if lane.guidance is None else lane.guidance

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; `Order(**...)` is the way back."""
        return dataclasses.asdict(self)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidValue(f"{name}: {value!r} is not a whole number from {low} to {high}.")


def _number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise InvalidValue(f"{name}: {value!r} is not a number from {low:g} to {high:g}.")


def build(
    count: int, color: str, shape: str, relation: str | None, color_2: str, shape_2: str
) -> tuple[str, dict[str, Any] | None]:
    """The caption of a scene put together from parts, and what the verifier should find in its picture.

    Args:
        count: of the first shape, 1 to 4.
        color, shape: of the first.
        relation: "left of", "right of", "above", "below" or "and"; None, or a count above 1: the first shape alone,
            because the model has never read of several of a kind beside something else.
        color_2, shape_2: of the second.

    Returns:
        Caption, and the prompt in GenEval's schema.
    """
    first = {"class": shape, "count": count, "color": color}
    phrase = noun_phrase(shape, color) if count == 1 else f"{COUNT_WORDS[count]} {color} {plural(shape)}"
    if relation is None or count > 1:
        tag = "colors" if count == 1 else "counting"
        return phrase, {"tag": tag, "include": [first], "exclude": [], "prompt": phrase}
    second = {"class": shape_2, "count": 1, "color": color_2}
    if relation == "and" or (color, shape) == (color_2, shape_2):
        caption = f"{phrase} and {noun_phrase(shape_2, color_2)}"
        return caption, {"tag": "color_attr", "include": [first, second], "exclude": [], "prompt": caption}
    side = relation if relation in ("above", "below") else f"to the {relation}"
    caption = f"{phrase} {side} {noun_phrase(shape_2, color_2)}"
    placed = first | {"position": [relation, 0]}
    return caption, {"tag": "position", "include": [second, placed], "exclude": [], "prompt": caption}


def sample_command(order: Order, lane: Lane, steps: int, options: dict[str, str] | None = None) -> str:
    """The line that draws the same picture.

    Args:
        order: what was drawn.
        lane: by which model.
        steps: in how many steps.
        options: further options, such as `text-encoder` for official weights.
    """
    said = ["--steps", str(steps), "--guidance", f"{order.guidance_of(lane):g}", "--seed", str(order.seed)]
    said += ["--model", lane.model]
    for name, value in (options or {}).items():
        said += [f"--{name}", value]
    caption = [order.caption, *said] if not order.caption.startswith("-") else [*said, "--", order.caption]
    return shlex.join(["nitro-e", "sample", *caption])


class Wire:
    """One end of a conversation in JSON.

    Args:
        connection: an open connection of `multiprocessing.connection`, of which only bytes are used.
        limit: bytes of the largest message to accept; None: any.
    """

    def __init__(self, connection: mpc.Connection, limit: int | None = None):
        self._connection, self._limit = connection, limit

    @classmethod
    def connect(cls, address: tuple[str, int], key: bytes) -> Wire:
        """Calls the worker.

        Raises:
            OSError: nobody answers, or with another key.
        """
        try:
            return cls(mpc.Client(tuple(address), authkey=key))
        except (mpc.AuthenticationError, EOFError) as error:
            raise NotWritten(f"the demo's worker did not accept the key ({error})") from None

    def send(self, message: dict[str, Any]) -> None:
        """Sends one message.

        Raises:
            OSError: the other end is gone.
        """
        self._connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        """Waits for a message.

        Raises:
            EOFError, OSError: the other end is gone, or sent too much.
            ValueError: what came is no JSON object.
        """
        message = json.loads(self._connection.recv_bytes(self._limit))
        if not isinstance(message, dict):
            raise InvalidValue("expected a JSON object")
        return message

    def close(self) -> None:
        """Ends the conversation; a `receive` in another thread ends too, which closing alone would not do."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)
