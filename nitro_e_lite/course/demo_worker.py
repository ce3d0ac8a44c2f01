"""The one process of the demo that draws: models, a queue, and lanes that take turns.

`Artist.draw` is the demo itself, a generator: after every step of a lane it says how far the lane is, how many seconds
*its own* steps have taken, and shows the picture the model believes in. Text, previews, the verifier and the other
lanes' turns are outside those seconds, so a lane is as fast here as in `nitro-e benchmark`. The notebook calls it
directly; `serve` calls it for one visitor after another, first come, first served, and looks between any two steps
whether the visitor is still there.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import multiprocessing.connection as mpc
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from nitro_e_lite import viz
from nitro_e_lite.course.demo_protocol import (
    LITE_VOCABULARY,
    MAX_MESSAGE,
    MAX_PER_MINUTE,
    MAX_QUEUE,
    Lane,
    Order,
    Wire,
    build,
    sample_command,
)
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.scenes.geneval import Prompt, judge
from nitro_e_lite.scenes.render import signed_distance
from nitro_e_lite.scenes.verifier import UNKNOWN, Detection, detect

EXAMPLE = (1, "red", "circle", "left of", "blue", "square")  # what a page shows until its visitor draws
OUTBOX = 400  # messages that may wait for a page; one that reads none of them is left


@dataclass
class LaneResult:
    """A lane, as far as it is.

    Attributes:
        lane: which of the list.
        name: `4 steps`.
        model: as the lane names it.
        done, total: steps.
        seconds: of the lane's own steps so far.
        image: the picture the model believes in; at the end, the picture.
        place: 1 for the lane that finished first; None before it has.
        saw: what the verifier found, each with a name and a box `x, y, half` in fractions of the picture; None when
            nobody has looked.
        correct: the verdict; None for free text.
        reason: why it is wrong.
        command: the line that draws the same picture.
        facts: what a PNG says about itself.
    """

    lane: int
    name: str
    model: str
    done: int
    total: int
    seconds: float
    image: Image.Image
    place: int | None = None
    saw: list[dict[str, Any]] | None = None
    correct: bool | None = None
    reason: str = ""
    command: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The same for a page: the picture as PNG, with its facts inside when it is finished."""
        values = {name: value for name, value in vars(self).items() if name not in ("image", "facts")}
        png = viz.png_bytes(self.image, self.facts)
        return {"kind": "step", **values, "png": base64.b64encode(png).decode()}


class Artist:
    """Models, and how to draw one order with all lanes.

    Args:
        lanes: what is compared.
        **loading: arguments of `load_pipeline` for every model, such as `device` or `text_encoder`.

    Raises:
        ValueError, EncoderUnavailable: a model cannot be loaded.
    """

    def __init__(self, lanes: Sequence[Lane], **loading: Any):
        self.lanes = list(lanes)
        self.options = {name.replace("_", "-"): str(value) for name, value in loading.items() if value is not None}
        self.pipelines = {lane.model: load_pipeline(lane.model, **loading) for lane in self.lanes}
        for pipeline in self.pipelines.values():
            pipeline.set_progress_bar_config(disable=True)

    @property
    def reads_shapes(self) -> bool:
        """Whether the models are this course's, whose pictures the verifier can judge."""
        return all(len(pipeline.tokenizer) < LITE_VOCABULARY for pipeline in self.pipelines.values())

    def facts(self) -> dict[str, Any]:
        """What a page wants to know about the lanes and the machine."""
        guided = next((lane for lane in self.lanes if lane.guidance is None), self.lanes[0])  # whom the dial is for
        first = self.pipelines[guided.model]
        return {
            "lanes": [asdict(lane) for lane in self.lanes],
            "guidance": first.config.default_guidance,
            "device": str(first.device),
            "threads": torch.get_num_threads(),
            "lite": self.reads_shapes,
        }

    def draw(self, order: Order) -> Iterator[LaneResult]:
        """Draws, and yields the lane that has just made a step, after each.

        Args:
            order: what to draw; `steps` has one number for each lane.

        Raises:
            ValueError: another number of lanes, or a prompt that means nothing.
        """
        if len(order.steps) != len(self.lanes):
            raise InvalidValue(f"steps: {len(order.steps)} numbers for {len(self.lanes)} lanes")
        prompt = Prompt.from_metadata(order.prompt) if order.prompt and self.reads_shapes else None
        if prompt and prompt.text != order.caption:
            raise InvalidValue("prompt: is not the caption's")
        walks = [self._lane(index, order, prompt) for index in range(len(self.lanes))]
        turns: deque[Iterator[LaneResult]] = deque(walks)
        if not order.race:
            shortest = sorted(range(len(walks)), key=lambda index: (order.steps[index], index))
            turns = deque(walks[index] for index in shortest)
        finished = 0
        while turns:
            walk = turns.popleft()
            result = next(walk)
            if result.done == result.total:
                finished += 1
                result.place = finished
            elif order.race:
                turns.append(walk)
            else:
                turns.appendleft(walk)
            yield result

    def _lane(self, index: int, order: Order, prompt: Prompt | None) -> Iterator[LaneResult]:
        lane, total = self.lanes[index], order.steps[index]
        pipeline, guidance = self.pipelines[lane.model], order.guidance_of(lane)
        steps = pipeline.steps(order.caption, total, guidance, generator=torch.Generator().manual_seed(order.seed))
        seconds = 0.0
        name = Lane(lane.model, total).name
        for step in steps:
            seconds += step.seconds
            last = step.index + 1 == step.total
            image = pipeline.decode(step.latents if last else step.x0)[0]
            result = LaneResult(index, name, lane.model, step.index + 1, step.total, seconds, image)
            if last:
                self._finish(result, order, lane, prompt)
            yield result

    def _finish(self, result: LaneResult, order: Order, lane: Lane, prompt: Prompt | None) -> None:
        """Verdict, command and facts of a finished picture."""
        pipeline = self.pipelines[lane.model]
        own = {name: value for name, value in self.options.items() if name in ("text-encoder", "vae", "dtype")}
        result.command = sample_command(order, lane, result.total, own)
        result.facts = {
            "prompt": order.caption,
            "negative prompt": "",
            "seed": order.seed,
            "model": lane.model,
            "steps": result.total,
            "guidance": order.guidance_of(lane),
            "shift": pipeline.shift,
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "device": str(pipeline.device),
        }
        if self.reads_shapes:
            found = detect(np.asarray(result.image))
            result.saw = [box(detection) for detection in found]
            if prompt:
                verdict = judge(found, prompt)
                result.correct, result.reason = verdict.correct, verdict.reason.partition(" (")[0]


def draw(artist: Artist, order: Order) -> list[LaneResult]:
    """Draws an order to its end and returns the finished lanes, in the order of the list."""
    done = [result for result in artist.draw(order) if result.done == result.total]
    return sorted(done, key=lambda result: result.lane)


def box(found: Detection) -> dict[str, Any]:
    """A detection as a page draws it: its name and a square around it, in fractions of the picture."""
    known = [word for word in (found.color, found.shape) if word != UNKNOWN]
    name = " ".join(known) + "?" * (len(known) < 2) if known else "unclear"
    return {"name": name, "x": found.x, "y": found.y, "half": _half(found.shape) * found.area**0.5 + 0.02}


@functools.cache
def _half(shape: str) -> float:
    """How far a shape reaches from its centre, in units of the square root of its area."""
    if shape == UNKNOWN:
        return 0.7
    y, x = np.mgrid[-1.5:1.5:120j, -1.5:1.5:120j]
    inside = signed_distance(shape, x, y) < 0
    reach = np.maximum(np.abs(x), np.abs(y))[inside].max()
    return float(reach / (inside.mean() * 9) ** 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Visitors
# ---------------------------------------------------------------------------------------------------------------------


class Visitor:
    """A page that is connected, seen from the worker. Sending never waits for the page."""

    def __init__(self, wire: Wire):
        self.wire, self.gone = wire, threading.Event()
        self.job: Job | None = None
        self._recent: deque[float] = deque()
        self._outbox: queue.Queue[dict | None] = queue.Queue(OUTBOX)
        threading.Thread(target=self._post, daemon=True).start()

    def tell(self, kind: str, **values: Any) -> None:
        """Sends a message, or gives the page up when it does not read."""
        with contextlib.suppress(queue.Full):
            self._outbox.put_nowait({"kind": kind, **values})
            return
        self.leave()

    def too_fast(self) -> bool:
        """Counts an order; whether there were too many in the last minute."""
        now = time.monotonic()
        while self._recent and now - self._recent[0] > 60:
            self._recent.popleft()
        if len(self._recent) >= MAX_PER_MINUTE:
            return True
        self._recent.append(now)
        return False

    def leave(self) -> None:
        """Nothing more is sent or drawn for this page."""
        self.gone.set()
        if self.job:
            self.job.stop.set()
        with contextlib.suppress(OSError):
            self.wire.close()

    def _post(self) -> None:
        while not self.gone.is_set():
            with contextlib.suppress(queue.Empty):
                message = self._outbox.get(timeout=30)
                try:
                    self.wire.send(message)
                except (OSError, ValueError):
                    self.leave()


@dataclass
class Job:
    """An order of a visitor: it waits, is drawn, or was stopped."""

    visitor: Visitor
    order: Order
    number: int
    stop: threading.Event = field(default_factory=threading.Event)


class Worker:
    """The queue, and the loop that draws what is in it.

    Args:
        artist: draws.
    """

    def __init__(self, artist: Artist):
        self.artist = artist
        self.example: list[dict[str, Any]] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()

    def warm_up(self) -> None:
        """Draws the example that every page shows until its visitor draws."""
        caption, prompt = build(*EXAMPLE)
        facts = self.artist.facts()
        steps = tuple(lane.steps for lane in self.artist.lanes)
        order = Order(caption, 0, facts["guidance"], steps, True, prompt)
        results = [result.message() for result in self.artist.draw(order)]
        self.example = [{"kind": "drawing", "order": order.as_dict()}, *results]

    def meet(self, wire: Wire) -> None:
        """Talks with one page until it leaves; runs in a thread of its own."""
        visitor = Visitor(wire)
        visitor.tell("hello", **self.artist.facts(), example=self.example)
        try:
            while not visitor.gone.is_set():
                message = wire.receive()
                if message.get("kind") == "draw":
                    self._accept(visitor, message)
                elif message.get("kind") == "stop" and (job := visitor.job):  # which another thread may take away
                    job.stop.set()
                    self._drop(job, tell=True)
        except (EOFError, OSError, ValueError):
            pass
        finally:
            visitor.leave()
            if visitor.job:
                self._drop(visitor.job, tell=False)

    def _accept(self, visitor: Visitor, message: dict[str, Any]) -> None:
        number = message.get("number", 0)
        try:
            order = Order(**message.get("order", {}))
            if len(order.steps) != len(self.artist.lanes):
                raise InvalidValue(f"steps: {len(order.steps)} numbers for {len(self.artist.lanes)} lanes")
        except (TypeError, ValueError) as error:
            visitor.tell("refused", number=number, why=str(error))
            return
        with self._changed:
            why = ""
            if visitor.job:
                why = "The last drawing is not finished; stop it first."
            elif len(self._waiting) >= MAX_QUEUE:
                why = f"{MAX_QUEUE} drawings wait already; try again in a minute."
            elif visitor.too_fast():
                why = f"That was quick: {MAX_PER_MINUTE} drawings a minute are served; wait a moment."
            if not why:
                visitor.job = Job(visitor, order, number)
                self._waiting.append(visitor.job)
                self._changed.notify()
                self._tell_places()
        if why:
            visitor.tell("refused", number=number, why=why)

    def _drop(self, job: Job, tell: bool) -> None:
        """Takes a job out of the queue, if it still waits."""
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            job.visitor.job = None
            self._tell_places()
        if tell:
            job.visitor.tell("stopped", number=job.number)

    def _tell_places(self) -> None:
        for place, job in enumerate(self._waiting, start=1):
            job.visitor.tell("place", number=job.number, place=place, waiting=len(self._waiting))

    def run(self) -> None:
        """Draws whatever is asked for, for ever."""
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                job = self._waiting.popleft()
                self._tell_places()
            self._serve(job)

    def _serve(self, job: Job) -> None:
        visitor, ending, values = job.visitor, "finished", {}
        visitor.tell("drawing", number=job.number, order=job.order.as_dict())
        try:
            for result in self.artist.draw(job.order):
                if job.stop.is_set():
                    ending = "stopped"
                    break
                visitor.tell(**result.message(), number=job.number)
        except (ValueError, FloatingPointError, RuntimeError) as error:
            ending, values = "refused", {"why": str(error)}
        visitor.job = None
        visitor.tell(ending, number=job.number, **values)


def serve(listener: mpc.Listener, key: bytes, worker: Worker) -> None:
    """Lets pages in, each in a thread of its own, so that one that stalls holds nobody up."""

    def greet(connection: mpc.Connection) -> None:
        try:
            mpc.deliver_challenge(connection, key)
            mpc.answer_challenge(connection, key)
        except (mpc.AuthenticationError, EOFError, OSError):
            connection.close()
            return
        worker.meet(Wire(connection, MAX_MESSAGE))

    while True:
        with contextlib.suppress(OSError, EOFError):
            threading.Thread(target=greet, args=(listener.accept(),), daemon=True).start()


def _leave_with_parent(stream: Any, end: Callable[[int], None] = os._exit) -> None:
    """Whoever started this process holds the other end of its input; when that closes, nobody needs it."""
    stream.read()
    end(0)


def main() -> None:
    """Reads from its input one line of JSON, `{"port", "key", "lanes", "loading", "threads"}`, loads and serves."""
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, args=(sys.stdin,), daemon=True).start()
    torch.set_num_threads(settings["threads"])
    listener = mpc.Listener(("127.0.0.1", settings["port"]), backlog=64)
    try:
        worker = Worker(Artist([Lane(**lane) for lane in settings["lanes"]], **settings["loading"]))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(2)
    worker.warm_up()
    threading.Thread(target=serve, args=(listener, bytes.fromhex(settings["key"]), worker), daemon=True).start()
    print(json.dumps({"ready": True}), flush=True)
    worker.run()


if __name__ == "__main__":
    main()
