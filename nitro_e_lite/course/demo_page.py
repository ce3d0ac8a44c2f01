"""The demo as a visitor sees it: widgets that ask a worker for pictures and show them as they form.

The same page stands in notebook 16 and behind `nitro-e demo --web`. It draws nothing itself and imports no torch: a
visitor's kernel must be there at once. Whatever the worker says arrives in a thread and is handed to the kernel's own
loop, so that clicks and messages never meet half-way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from nitro_e_lite.course import demo_html as html
from nitro_e_lite.course.demo_protocol import (
    ENVIRONMENT,
    MAX_CAPTION,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    Lane,
    Order,
    Wire,
    build,
)
from nitro_e_lite.errors import Unusable
from nitro_e_lite.scenes.captions import unknown_words
from nitro_e_lite.scenes.grammar import COLORS, RELATIONS, SHAPES, SIZES

GALLERY = 12  # pictures
ALONE = "on its own"
READY = "<p>Press Race. The first time, the models are loaded too, which takes a few seconds.</p>"
SETTLE_SECONDS = 0.5  # after a click; a browser sends clicks at once but what was typed just before a moment later
SCALES = (0.5, 2.0, 1.0)  # of the lanes' steps, for "same seed, other steps"


class Line:
    """The page's end of the conversation with the worker; calls again when the worker is gone.

    Args:
        connect: reaches the worker, or raises OSError when it is not there yet, RuntimeError when it never will be.
        deliver: gets every message, in a thread of its own, and one of kind "lost" or "failed" in those two cases.
    """

    def __init__(self, connect: Callable[[], Wire], deliver: Callable[[dict[str, Any]], None]):
        self._connect, self._deliver = connect, deliver
        self._wire: Wire | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Starts calling, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._talk, daemon=True)
            self._thread.start()

    def send(self, message: dict[str, Any]) -> bool:
        """Sends, and says whether the worker was there."""
        with contextlib.suppress(OSError):
            if self._wire is not None:
                self._wire.send(message)
                return True
        return False

    def _talk(self) -> None:
        while True:
            try:
                self._wire = self._connect()
                while True:
                    self._deliver(self._wire.receive())
            except RuntimeError as error:  # it cannot be started at all; the next drawing tries again
                self._wire = self._thread = None
                self._deliver({"kind": "failed", "why": str(error)})
                return
            except (EOFError, OSError, ValueError):
                self._wire = None
                self._deliver({"kind": "lost"})
                time.sleep(0.5)


def _from_environment() -> tuple[Callable[[], Wire], list[Lane]]:
    """Worker and lanes as `nitro-e demo --web` names them to the kernels it starts."""
    if ENVIRONMENT not in os.environ:
        raise Unusable("this page belongs to a server: nitro-e demo --web")
    facts = json.loads(os.environ[ENVIRONMENT])
    lanes = [Lane(**lane) for lane in facts["lanes"]]
    return lambda: Wire.connect(facts["address"], bytes.fromhex(facts["key"])), lanes


class Page:
    """The widgets of one visitor.

    Args:
        lanes: what is compared; None: what the server says.
        connect: reaches a worker; None: the server's. The worker is called when the first drawing is asked for.

    Attributes:
        widget: to be displayed.
    """

    def __init__(self, lanes: Sequence[Lane] | None = None, connect: Callable[[], Wire] | None = None):
        self._served = connect is None
        if self._served:
            connect, lanes = _from_environment()
        self.lanes = list(lanes)
        self.facts: dict[str, Any] | None = None
        self._number = 0  # of the last order
        self._busy = False
        self._pending: dict[str, Any] | None = None  # an order that waits for the worker to be there
        self._settling: Any = None  # the handle of one that waits for the controls
        self._order: dict[str, Any] | None = None  # what is shown
        self._frames: list[list[dict[str, Any]]] = [[] for _ in self.lanes]
        self._prompt: dict[str, Any] | None = None  # of the caption that was built
        self._scale = 0
        self._gallery: list[widgets.Widget] = []
        self._line = Line(connect, self._hand_over)
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._make()
        self._rebuild()
        if self._served:
            self._line.open()

    # Widgets

    def _make(self) -> None:
        """All widgets, and what happens when they are used."""
        self._status = widgets.HTML(READY)
        self._hint = widgets.HTML("")
        self._head, self._foot = widgets.HTML(html.header()), widgets.HTML(html.footer(None, self._served))
        controls = _box("nl-controls", [self._builder(), self._captions(), self._dials(), self._buttons()])
        self._steps = [
            widgets.BoundedIntText(
                lane.steps, min=1, max=MAX_STEPS, description="Steps", tooltip=f"Steps of lane {index}"
            )
            for index, lane in enumerate(self.lanes, start=1)
        ]
        self._titles = [widgets.HTML(html.lane_title(lane, lane.steps)) for lane in self.lanes]
        self._pictures = [widgets.HTML(html.picture(None, "", None)) for _ in self.lanes]
        cards = []
        for title, steps, picture in zip(self._titles, self._steps, self._pictures, strict=True):
            top = _box("nl-lane-top", [title, steps])
            cards.append(_box("nl-lane", [top, picture]))
        self._choice = widgets.ToggleButtons(
            options=[(lane.name, index) for index, lane in enumerate(self.lanes)], description="Film strip of"
        )
        self._choice.observe(lambda change: self._show_film(), "value")
        self._strip = widgets.HTML(html.film([], "", 0))
        self._shelf = _box("nl-shelf", [])
        empty = widgets.HTML(
            '<p class="nl-quiet">Your last twelve pictures will hang here; a click brings one back.</p>'
        )
        self._gallery_note = empty
        sections = [
            _named("nl-head", self._head),
            controls,
            _named("nl-status", self._status),
            _box(f"nl-lanes nl-lanes-{len(self.lanes)}", cards),
            _box("nl-card nl-strip", [widgets.HTML("<h2>Step by step</h2>"), self._choice, self._strip]),
            _box("nl-card nl-gallery", [widgets.HTML("<h2>Gallery</h2>"), self._gallery_note, self._shelf]),
            _named("nl-foot", self._foot),
        ]
        self.widget = _box("nl", [widgets.HTML(html.style()), *sections])

    def _builder(self) -> widgets.Widget:
        self._count = widgets.Dropdown(options=[1, 2, 3, 4], description="Count")
        self._color = widgets.Dropdown(options=list(COLORS), description="Colour")
        self._shape = widgets.Dropdown(options=SHAPES, description="Shape")
        places = [ALONE, "and", *RELATIONS]
        self._relation = widgets.Dropdown(options=places, value=RELATIONS[0], description="Relation")
        self._color_2 = widgets.Dropdown(options=list(COLORS), value="blue", description="Second colour")
        self._shape_2 = widgets.Dropdown(options=SHAPES, value="square", description="Second shape")
        parts = [self._count, self._color, self._shape, self._relation, self._color_2, self._shape_2]
        for part in parts:
            part.observe(lambda change: self._rebuild(), "value")
        return _box("nl-builder", parts)

    def _captions(self) -> widgets.Widget:
        self._caption = widgets.Text(description="Caption", placeholder="two orange triangles")
        self._caption.observe(lambda change: self._read_caption(), "value")
        with warnings.catch_warnings():  # the one way to hear the return key
            warnings.simplefilter("ignore", DeprecationWarning)
            self._caption.on_submit(lambda text: self.draw(race=True))
        return _box("nl-caption", [self._caption, _named("nl-hint", self._hint)])

    def _dials(self) -> widgets.Widget:
        self._seed = widgets.BoundedIntText(0, min=0, max=MAX_SEED, description="Seed")
        self._guidance = widgets.BoundedFloatText(3.0, min=0, max=MAX_GUIDANCE, step=0.5, description="Guidance")
        dice = _button("New seed", "nl-dice", "Throw the dice: another seed, drawn at once", self._throw)
        return _box("nl-dials", [self._seed, dice, self._guidance])

    def _buttons(self) -> widgets.Widget:
        def other(_: Any) -> None:
            self.draw(race=True, other_steps=True)

        buttons = [
            _button("Race", "nl-race", "All lanes at once, turn by turn", lambda _: self.draw(race=True)),
            _button("One by one", "nl-draw", "The shortest lane first, then the next", lambda _: self.draw(race=False)),
            _button("Same seed, other steps", "nl-other", "Half the steps, then twice, then as they were", other),
            _button("Stop", "nl-stop", "Stop drawing", lambda _: self.stop()),
        ]
        self._actions = _box("nl-buttons", buttons)
        return self._actions

    # What a visitor does

    def draw(self, race: bool, other_steps: bool = False) -> None:
        """Orders what the controls say, once they have settled; one drawing at a time.

        Args:
            race: all lanes take turns; else one after the other.
            other_steps: takes other numbers of steps than the last time.
        """
        if self._busy:
            self._say("Still drawing. Stop ends it.")
            return
        self._set_busy(True)
        if self._loop is None:
            self._order_now(race, other_steps)
        else:
            self._settling = self._loop.call_later(SETTLE_SECONDS, self._order_now, race, other_steps)

    def _order_now(self, race: bool, other_steps: bool) -> None:
        self._settling = None
        if other_steps:
            factor = SCALES[self._scale % len(SCALES)]
            self._scale += 1
            for field, lane in zip(self._steps, self.lanes, strict=True):
                field.value = min(MAX_STEPS, max(1, round(lane.steps * factor)))
        caption = " ".join(self._caption.value.split())
        prompt = self._prompt if self._prompt and self._prompt["prompt"] == caption else None
        try:
            steps = tuple(field.value for field in self._steps)
            order = Order(caption, self._seed.value, self._guidance.value, steps, race, prompt)
        except ValueError as error:
            self._end(str(error), "nl-bad")
            return
        self._number += 1
        self._say("Asking for a turn ...")
        message = {"kind": "draw", "number": self._number, "order": order.as_dict()}
        if not self._line.send(message):
            self._pending = message
            self._say("The models are loading; your drawing is next.")
            self._line.open()

    def stop(self) -> None:
        """Ends the drawing that waits or is being drawn."""
        if not self._busy:
            return
        if self._settling:
            self._settling = self._settling.cancel()
            self._end("Stopped.")
        elif self._pending:
            self._pending = None
            self._end("Stopped.")
        else:
            self._say("Stopping ...")
            self._line.send({"kind": "stop"})

    def _throw(self, _: Any) -> None:
        self._seed.value = secrets.randbelow(10_000)
        if not self._busy:
            self.draw(race=True)

    def _rebuild(self) -> None:
        """Writes the caption that the builder's parts make."""
        relation = None if self._relation.value == ALONE else self._relation.value
        single = self._count.value == 1
        self._relation.disabled = not single
        for part in (self._color_2, self._shape_2):
            part.disabled = not single or relation is None
        parts = (self._count, self._color, self._shape)
        words = [part.value for part in parts]
        self._caption.value, self._prompt = build(*words, relation, self._color_2.value, self._shape_2.value)

    def _read_caption(self) -> None:
        """Says at once what the model cannot read."""
        caption, lite = self._caption.value, (self.facts or {"lite": True})["lite"]
        unknown = unknown_words(caption) if lite else []
        hint = ""
        if len(caption) > MAX_CAPTION:
            hint = f"{len(caption)} characters; {MAX_CAPTION} are read at most."
        elif unknown:
            hint = (
                f"The model has never read <b>{html.escape(', '.join(unknown[:6]))}</b>. It knows {', '.join(SHAPES)}; "
                f"{', '.join(COLORS)}; {', '.join(SIZES)}; one to four of a kind; {', '.join(RELATIONS)}."
            )
        self._hint.value = hint

    # What the worker says

    def _hand_over(self, message: dict[str, Any]) -> None:
        if self._loop is None:
            self.receive(message)
        else:
            self._loop.call_soon_threadsafe(self.receive, message)

    def receive(self, message: dict[str, Any]) -> None:
        """Shows what a message of the worker says; messages about an order that was given up are ignored."""
        kind = message["kind"]
        if message.get("number", self._number) == self._number or kind in ("hello", "lost", "failed"):
            getattr(self, f"_on_{kind}")(message)

    def _on_hello(self, message: dict[str, Any]) -> None:
        known, self.facts = self.facts is not None, message
        self._foot.value = html.footer(message, self._served)
        if not known:
            self._guidance.value = message["guidance"]
            self._read_caption()
        if self._pending:
            self._line.send(self._pending)
            self._pending = None
        elif self._order is None:
            self._show_example(message["example"])

    def _show_example(self, messages: list[dict[str, Any]]) -> None:
        """What the worker drew for everybody when it started, laid out at once."""
        steps = [message for message in messages if message["kind"] == "step"]
        if steps:
            self._lay_out(messages[0]["order"], [[s for s in steps if s["lane"] == i] for i in range(len(self.lanes))])
            self._hang()
            self._say("Here is one drawn earlier. Press Race, or write a caption of your own.")

    def _on_lost(self, message: dict[str, Any]) -> None:
        if self._busy and self._pending is None:
            self._end("The process that draws ended and is being started again. Please draw once more.", "nl-bad")

    def _on_failed(self, message: dict[str, Any]) -> None:
        self._pending = None
        self._end(f"The models could not be loaded: {message['why']}", "nl-bad")

    def _on_place(self, message: dict[str, Any]) -> None:
        self._say(html.queue_place(message["place"], message["waiting"]))

    def _on_drawing(self, message: dict[str, Any]) -> None:
        self._lay_out(message["order"], [[] for _ in self.lanes])
        self._say("Racing ..." if self._order["race"] else "Drawing ...")

    def _on_step(self, message: dict[str, Any]) -> None:
        index = message["lane"]
        self._frames[index].append(message)
        self._show_lane(index)
        if message["place"]:
            self._say(f"{message['name']} finished after {html.seconds_text(message['seconds'])} ...")
        if index == self._choice.value:
            self._show_film()

    def _on_finished(self, message: dict[str, Any]) -> None:
        order = sorted((frames[-1] for frames in self._frames), key=lambda result: result["place"])
        verdicts = {True: ", right", False: ", wrong", None: ""}
        times = [
            f"{result['name']} in {html.seconds_text(result['seconds'])}{verdicts[result['correct']]}"
            for result in order
        ]
        self._end(f"Done: {'; '.join(times)}.")
        self._hang()

    def _on_stopped(self, message: dict[str, Any]) -> None:
        self._end("Stopped.")

    def _on_refused(self, message: dict[str, Any]) -> None:
        self._end(message["why"], "nl-bad")

    # What is shown

    def _say(self, text: str, kind: str = "") -> None:
        self._status.value = f'<p class="{kind}">{html.escape(text)}</p>'

    def _end(self, text: str, kind: str = "") -> None:
        """A drawing has ended, or has not begun; lanes compare themselves with the first, whose time is known now."""
        self._set_busy(False)
        self._say(text, kind)
        if self._order is not None:
            for index in range(len(self.lanes)):
                self._show_lane(index)

    def _set_busy(self, busy: bool) -> None:
        self._busy = busy
        (self._actions.add_class if busy else self._actions.remove_class)("nl-busy")

    def _lay_out(self, order: dict[str, Any], frames: list[list[dict[str, Any]]]) -> None:
        """An order and what is drawn of it."""
        self._order, self._frames = order, frames
        self._choice.options = [(Lane("-", steps).name, index) for index, steps in enumerate(order["steps"])]
        for index, steps in enumerate(order["steps"]):
            self._titles[index].value = html.lane_title(self.lanes[index], steps)
            self._show_lane(index)
        self._show_film()

    def _show_lane(self, index: int) -> None:
        last = [frames[-1] if frames else None for frames in self._frames]
        self._pictures[index].value = html.picture(last[index], self._order["caption"], last[0], not self._busy)

    def _show_film(self) -> None:
        chosen = self._choice.value or 0
        if self._order is not None:
            self._strip.value = html.film(self._frames[chosen], self._order["caption"], self._order["steps"][chosen])

    def _hang(self) -> None:
        """Puts the finished pictures into the gallery, the newest first."""
        order, frames = self._order, self._frames
        new = []
        for shown in frames:
            tip = f"Bring back: {order['caption']}, {shown[-1]['name']}, seed {order['seed']}"
            button = _button("", "nl-bring", tip, lambda _: self._bring_back(order, frames))
            thumbnail = widgets.HTML(html.thumbnail(shown[-1], order["caption"]))
            new.append(_box("nl-thumb", [thumbnail, button]))
        for old in (self._gallery)[GALLERY - len(new) :]:
            for part in (*old.children, old):
                part.close()
        self._gallery = [*new, *self._gallery][:GALLERY]
        self._shelf.children = tuple(self._gallery)
        self._gallery_note.layout.display = "none"

    def _bring_back(self, order: dict[str, Any], frames: list[list[dict[str, Any]]]) -> None:
        """All settings and pictures of an earlier drawing."""
        if self._busy:
            self._say("Still drawing. Stop ends it.")
            return
        self._caption.value, self._prompt = order["caption"], order["prompt"]
        self._seed.value, self._guidance.value = order["seed"], order["guidance"]
        for field, steps in zip(self._steps, order["steps"], strict=True):
            field.value = steps
        self._lay_out(order, frames)
        self._say(f"Back: seed {order['seed']}, guidance {order['guidance']:g}. Race draws the same pictures again.")


def _box(classes: str, children: Sequence[widgets.Widget]) -> widgets.Box:
    box = widgets.Box(children)
    for name in classes.split():
        box.add_class(name)
    return box


def _named(name: str, widget: widgets.Widget) -> widgets.Widget:
    widget.add_class(name)
    return widget


def _button(text: str, name: str, tip: str, action: Callable[[Any], None]) -> widgets.Button:
    button = widgets.Button(description=text, tooltip=tip)
    button.add_class(name)
    button.on_click(action)
    return button
