"""The pieces of the demo's page that are pictures and text: plain functions from what was drawn to HTML.

Everything a visitor typed is escaped here. Colours, light and dark, and all sizes are in `demo/page.css`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nitro_e_lite.course.demo_protocol import IDLE_MINUTES, MAX_CAPTION, MAX_PER_MINUTE, MAX_QUEUE, Lane

DATA = Path(__file__).resolve().parent / "demo"
ORDINALS = ("1st", "2nd", "3rd", "4th")
COPY = (  # the line itself is selected and copied, which every browser allows at a click, wherever the page comes from
    "getSelection().selectAllChildren(this.closest('figcaption').querySelector('code')); document.execCommand('copy'); "
    "this.textContent = 'Copied'; setTimeout(() => { this.innerHTML = 'Copy<i> command</i>'; }, 1500)"
)
EMPTY = '<div class="nl-frame nl-empty" role="img" aria-label="No picture yet"><i></i></div>'


def style() -> str:
    """The style sheet, for a page that has none yet."""
    return f"<style>{(DATA / 'page.css').read_text(encoding='utf-8')}</style>"


def header() -> str:
    """The title and one sentence."""
    return (
        '<div class="nl-brand"><svg viewBox="0 0 96 32" aria-hidden="true"><circle cx="15" cy="16" r="12"/>'
        '<rect x="36" y="5" width="22" height="22" rx="1.5"/><path d="M80 4 93 27H67z"/></svg>'
        "<div><h1>Twenty steps beside four</h1>"
        "<p>One caption, the same noise, fewer and fewer steps. Watch what is gained and what bends.</p></div></div>"
    )


def seconds_text(seconds: float) -> str:
    """`68 ms`, `1.36 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def lane_title(lane: Lane, steps: int) -> str:
    """Above a picture: how many steps, of which model."""
    name = re.split(r"[/\\]", lane.model.rstrip("/\\"))[-1].removesuffix(".safetensors")
    return f'<h2>{Lane(lane.model, steps).name}</h2><p title="{escape(lane.model)}">{escape(name)}</p>'


def picture(
    result: Mapping[str, Any] | None, caption: str, first: Mapping[str, Any] | None, stopped: bool = False
) -> str:
    """A lane's picture with all that is known about it.

    Args:
        result: the lane's last message of kind "step"; None before there is one.
        caption: what is drawn.
        first: the last message of the first lane, which others are compared with.
        stopped: the drawing has ended, however far this lane is.
    """
    finished = result is not None and result["done"] == result["total"]
    image = EMPTY if result is None else f'<div class="nl-frame">{_image(result, caption, finished)}</div>'
    if finished:
        more = _verdict(result) + _keepsakes(result, caption)
    else:
        told = "Stopped before the end." if stopped else "The verdict comes with the last step."
        more = f'<p class="nl-verdict nl-later">{told}</p>'
    meter = _meter(result, first, stopped)
    return f'<figure class="nl-figure">{image}<figcaption>{meter}{more}</figcaption></figure>'


def _image(result: Mapping[str, Any], caption: str, finished: bool) -> str:
    """What a lane has drawn, with what the verifier saw in it."""
    alt = f"{result['name']}: {caption}"
    if not finished:
        alt += f", as the model believes after step {result['done']} of {result['total']}"
    elif result["saw"]:
        alt += f"; the verifier sees {_listed(result['saw'])}"
    boxes = _boxes(result["saw"], result["correct"]) if finished and result["saw"] else ""
    return f'<img src="data:image/png;base64,{result["png"]}" alt="{escape(alt)}" decoding="sync">{boxes}'


def _meter(result: Mapping[str, Any] | None, first: Mapping[str, Any] | None, stopped: bool) -> str:
    """Time, place, progress and speed-up of a lane."""
    if result is None:
        time, note, share = "&ndash;", "not begun" if stopped else "waiting", 0.0
    else:
        done, total, time = result["done"], result["total"], seconds_text(result["seconds"])
        note, share = f"step {done} of {total}", done / total
        if done == total:
            note = f"<i>{seconds_text(result['seconds'] / total)} a step</i>"
            if first is not None and first is not result and first["done"] == first["total"] and result["seconds"]:
                ratio = first["seconds"] / result["seconds"]
                note = f'<em title="as {escape(first["name"])}">{ratio:.1f}&times;<i> as fast</i></em>'
    place = result.get("place") if result else None
    medal = f'<span class="nl-medal nl-place-{place}">{ORDINALS[place - 1]}</span>' if place else ""
    return (
        f'<div class="nl-meter"><b>{time}</b>{medal}<span class="nl-note">{note}</span></div>'
        f'<div class="nl-bar"><i style="width:{100 * share:.0f}%"></i></div>'
    )


def _listed(saw: Sequence[Mapping[str, Any]]) -> str:
    names = Counter(item["name"] for item in saw)
    return ", ".join(f"{count} \u00d7 {name}" if count > 1 else name for name, count in names.items()) or "nothing"


def _verdict(result: Mapping[str, Any]) -> str:
    if result["saw"] is None:
        return '<p class="nl-verdict">No verdict: the verifier reads only the shapes of this course.</p>'
    seen = escape(_listed(result["saw"]))
    if result["correct"] is None:
        return f'<p class="nl-verdict"><b>Seen</b> {seen}</p>'
    if result["correct"]:
        return f'<p class="nl-verdict nl-right"><b>Right</b> {seen}</p>'
    reason = result["reason"].partition(": ")[2] or result["reason"]
    return f'<p class="nl-verdict nl-wrong"><b>Wrong</b> {escape(reason)}</p>'


def _boxes(saw: Sequence[Mapping[str, Any]], correct: bool | None) -> str:
    """The corners of a box around everything the verifier saw, with its name."""
    kind = {True: "nl-right", False: "nl-wrong", None: ""}[correct]
    parts = []
    for item in saw:
        x, y, half = (100 * item[name] for name in ("x", "y", "half"))
        left, right = max(1.0, x - half), min(99.0, x + half)
        top, bottom = max(1.0, y - half), min(99.0, y + half)
        arm = min(5.0, (right - left) / 3, (bottom - top) / 3)
        corners = [
            (left, top, arm, arm),
            (right, top, -arm, arm),
            (right, bottom, -arm, -arm),
            (left, bottom, arm, -arm),
        ]
        path = " ".join(f"M{cx + dx:.1f} {cy:.1f}H{cx:.1f}V{cy + dy:.1f}" for cx, cy, dx, dy in corners)
        width = 2.4 * len(item["name"])
        middle = min(max(x, 1 + width / 2), 99 - width / 2)
        below = bottom + 4.6 if bottom < 94 else bottom - 2.0
        parts.append(
            f'<path class="nl-halo" d="{path}"/><path d="{path}"/>'
            f'<text x="{middle:.1f}" y="{below:.1f}">{escape(item["name"])}</text>'
        )
    return f'<svg class="nl-boxes {kind}" viewBox="0 0 100 100" aria-hidden="true">{"".join(parts)}</svg>'


def _keepsakes(result: Mapping[str, Any], caption: str) -> str:
    """Save and share."""
    name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:50] or "picture"
    command = escape(result["command"])
    return (
        f'<p class="nl-keep"><a download="{name}-{result["total"]}-steps.png" '
        f'href="data:image/png;base64,{result["png"]}" aria-label="Save the picture of {result["name"]} as PNG">'
        f'Save PNG</a><button type="button" onclick="{escape(COPY)}" '
        f'aria-label="Copy the command that draws the picture of {result["name"]}">Copy<i> command</i></button></p>'
        f'<code class="nl-command" tabindex="0">{command}</code>'
    )


def film(frames: Sequence[Mapping[str, Any]], caption: str, total: int) -> str:
    """What a lane believed after each of its steps; the steps that are still to come are empty frames."""
    if not total:
        return '<p class="nl-quiet">Every step of a drawing will be kept here, in a row.</p>'
    items = "".join(
        f'<li><img src="data:image/png;base64,{frame["png"]}" alt="After step {frame["done"]}" decoding="sync">'
        f"<span>{frame['done']}</span></li>"
        for frame in frames
    )
    items += "".join(f'<li class="nl-blank"><span>{step}</span></li>' for step in range(len(frames) + 1, total + 1))
    spent = f"{frames[-1]['name']}, {seconds_text(frames[-1]['seconds'])}: " if frames else ""
    about = f"{spent}the finished picture that the model believed in after each step."
    return (
        f'<ol class="nl-film" aria-label="{escape(caption)}, step by step" tabindex="0">{items}</ol>'
        f'<p class="nl-quiet">{about[0].upper()}{about[1:]}</p>'
    )


def thumbnail(result: Mapping[str, Any], caption: str) -> str:
    """A picture of the gallery; the button above it speaks for it."""
    mark = {True: '<i class="nl-right">right</i>', False: '<i class="nl-wrong">wrong</i>', None: ""}[result["correct"]]
    return (
        f'<img src="data:image/png;base64,{result["png"]}" alt="" decoding="sync">'
        f"<span><b>{result['name']}</b>{mark}</span><small>{escape(caption)}</small>"
    )


def queue_place(place: int, waiting: int) -> str:
    """`You are third of five`, in numbers."""
    if place == 1:
        return "You are next."
    minutes = math.ceil(place * 4 / 60)
    return f"You are number {place} of {waiting} who wait; about {minutes} minute{'s' * (minutes != 1)}."


def footer(facts: Mapping[str, Any] | None, shared: bool) -> str:
    """How the clock is read, and the limits, which are fewer where one worker draws for one page."""
    threads = (facts or {}).get("threads", 1)
    device = (facts or {}).get("device", "cpu")
    where = f"{threads} processor thread{'s' * (threads != 1)}" if device == "cpu" else f"one device ({escape(device)})"
    limits = f"{MAX_CAPTION} characters a caption, {MAX_PER_MINUTE} drawings a minute"
    if shared:
        limits += f" for a visitor, {MAX_QUEUE} in the queue. A page that nobody touches for {IDLE_MINUTES} minutes "
        limits += "goes to sleep"
    return (
        f"<p><b>A fair race.</b> One process draws everything, on {where}. In a race the lanes take turns, step by "
        "step, so none gets more of the machine than another. The time below a picture is that of its own steps: "
        "reading the caption, the previews and the other lanes&rsquo; turns are not counted.</p>"
        "<p><b>The same picture again.</b> Same caption, seed, steps and guidance give the same pixels; with another "
        "number of threads they may differ by 1 in 255.</p>"
        f"<p><b>Limits.</b> {limits}.</p>"
    )
