"""Rewards: one number for a picture and what it should show.

Learning from rewards asks one thing of a judge, `score(pictures, prompts) -> (B,)`, higher is better. Whether the judge
is arithmetic, a network or a program in another environment on another machine is behind that line:

* `geneval` is the strict verdict of GenEval-lite, 0 or 1; `partial` is its credit for what is right already, so that a
  group of failures still says which way is better; `preference` likes clean pictures, see `learned_judges.py`;
  `redness` is the easy reward of tests and lessons.
* `RemoteReward` asks a server over HTTP. GenEval's detector and HPSv2.1 need environments of their own, in which
  `judge_server.py` serves them; `RewardServer` is the reference for such a server, and serves the lite rewards.

**Adding rewards.** GenEval jumps by 1 where HPSv2.1 moves by 0.02: in a plain sum one drowns the other. With
`normalize` each is brought to mean 0 and deviation 1 over the batch first:

    total = sum_k weight_k (r_k - mean r_k) / (std r_k + 1e-4)

**Distrust.** A broken judge ruins a run silently. `preflight` shows each reward a good and a bad picture before the
first roll-out, those of its server where it has some; a batch that is not finite, or all the same, stops the run with
the name of the reward.

The wire, JSON over HTTP: `POST /score` takes `{"images": [PNG in base64, ...], "prompts": [GenEval metadata, ...]}` and
answers `{"scores": [number, ...]}`; `GET /health` answers `{"name": ..., "ready": true}` and, when the judge knows no
circles, `"examples": {"prompt": GenEval metadata, "good": PNG in base64, "bad": PNG in base64}`.

Source: Flow-GRPO (rewards from GenEval and preference models, partly remote). Differs: there the sum is a plain one.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from http.client import HTTPConnection, HTTPSConnection, responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from nitro_e_lite.errors import InvalidValue, NotFiniteScores, Unusable
from nitro_e_lite.evaluation.learned_judges import PreferenceModel, load_judge
from nitro_e_lite.evaluation.official_geneval import check_entry
from nitro_e_lite.files import explain_json, read_json_line
from nitro_e_lite.runtime import rank_and_world
from nitro_e_lite.scenes.degrade import degrade
from nitro_e_lite.scenes.geneval import Prompt, judge, true_scene
from nitro_e_lite.scenes.grammar import COLORS
from nitro_e_lite.scenes.render import render
from nitro_e_lite.scenes.verifier import Detection, detect

EPS = 1e-4  # added to a deviation
LARGEST_REQUEST = 2**28  # bytes
LARGEST_PICTURES = 2**28  # pixels of all pictures in a request
PREFLIGHT = Prompt("a red circle", "colors", (("circle", "red"),))


class Asked(Protocol):
    """What a picture should show: a `geneval.Prompt`, or any object with these."""

    text: str
    tag: str

    def metadata(self) -> dict:
        """The same in GenEval's schema."""


@dataclasses.dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file in GenEval's schema, about anything."""

    entry: dict[str, Any]

    @property
    def text(self) -> str:
        """The caption."""
        return self.entry["prompt"]

    @property
    def tag(self) -> str:
        """Its kind."""
        return self.entry["tag"]

    def metadata(self) -> dict[str, Any]:
        """The entry itself."""
        return self.entry


class Reward(Protocol):
    """A judge.

    Attributes:
        name: in metrics and messages.
    """

    name: str

    def score(self, pictures: np.ndarray, prompts: Sequence[Asked]) -> np.ndarray:
        """How well pictures, uint8 (B, H, W, 3), show their prompts: float (B,), higher is better."""


# -- the rewards of this project


class GenEvalReward:
    """GenEval-lite's verdict: 1 for a picture that shows exactly its prompt, else 0."""

    name = "geneval"

    def score(self, pictures: np.ndarray, prompts: Sequence[Asked]) -> np.ndarray:
        """Verdicts (B,), 0 or 1."""
        pairs = zip(pictures, map(scene_prompt, prompts), strict=True)
        return np.array([float(judge(_detect(picture), prompt).correct) for picture, prompt in pairs])


class PartialCredit:
    """The share of a prompt's demands that a picture meets, see `partial_credit`."""

    name = "partial"

    def score(self, pictures: np.ndarray, prompts: Sequence[Asked]) -> np.ndarray:
        """Credits (B,) in [0, 1]."""
        pairs = zip(pictures, map(scene_prompt, prompts), strict=True)
        return np.array([partial_credit(_detect(picture), prompt) for picture, prompt in pairs])


class Redness:
    """How red a picture is, whatever was asked: red minus the mean of green and blue, in [-1, 1]."""

    name = "redness"

    def score(self, pictures: np.ndarray, prompts: Sequence[Asked]) -> np.ndarray:
        """Redness (B,)."""
        red, green, blue = np.moveaxis(np.asarray(pictures, np.float64).mean((1, 2)), -1, 0) / 255  # (B,) each
        return red - (green + blue) / 2


class Preference:
    """How nice a picture is, whatever was asked: the lite preference model, see `learned_judges.py`.

    Attributes:
        examples: a circle, and the same one blurred: it cares how pictures are drawn and not what they show.
    """

    name = "preference"

    def __init__(self):
        self.model = load_judge(PreferenceModel)
        clean = true_scene(PREFLIGHT)
        self.examples = PREFLIGHT, np.stack([render(clean), degrade(clean, "blur", np.random.default_rng(0))])

    def score(self, pictures: np.ndarray, prompts: Sequence[Asked]) -> np.ndarray:
        """Log-odds (B,)."""
        return self.model.score(pictures)


def scene_prompt(prompt: Asked) -> Prompt:
    """A prompt about lite scenes, for judges that read nothing else.

    Raises:
        ValueError: it is about something else.
    """
    return prompt if isinstance(prompt, Prompt) else Prompt.from_metadata(prompt.metadata())


def check_prompts(rewards: Sequence[Reward], prompts: Iterable[Asked]) -> None:
    """Refuses prompts that one of the rewards cannot read, before anything is drawn.

    Raises:
        ValueError: see `scene_prompt`; the reward is named.
    """
    readers = [reward.name for reward in rewards if isinstance(reward, GenEvalReward | PartialCredit)]
    for prompt in prompts if readers else ():
        try:
            scene_prompt(prompt)
        except InvalidValue as error:
            raise InvalidValue(f"prompts: the reward {readers[0]} reads lite scenes alone; {error}") from None


def partial_credit(found: Sequence[Detection], prompt: Prompt) -> float:
    """The mean over what a prompt asks for, each in [0, 1]; 1 exactly for what `judge` calls correct.

    The number of objects, by how far it is off; shapes, by how many find a partner; the same with colours, where they
    are asked for; the relation, where there is one. Objects too many count against shapes and colours.
    """
    asked, most = prompt.objects, max(len(found), len(prompt.objects))
    parts = [max(0.0, 1 - abs(len(found) - len(asked)) / len(asked))]
    parts.append(_matched(found, [(shape, None) for shape, _ in asked]) / most)
    if any(color for _, color in asked):
        parts.append(_matched(found, asked) / most)
    if prompt.relation:
        parts.append(float(judge(found, prompt).correct))
    return float(np.mean(parts))


def _matched(found: Sequence[Detection], asked: Sequence[tuple[str, str | None]]) -> int:
    """How many of the objects asked for are there, each found object counted once."""
    if not found:
        return 0
    fits = np.array([[d.shape == s and c in (None, d.color) for s, c in asked] for d in found])  # (found, asked)
    rows, columns = linear_sum_assignment(fits, maximize=True)
    return int(fits[rows, columns].sum())


def _detect(picture: np.ndarray) -> tuple[Detection, ...]:
    return _detect_bytes(np.ascontiguousarray(picture).tobytes(), picture.shape)


@lru_cache(maxsize=512)  # two rewards ask about the same picture
def _detect_bytes(pixels: bytes, shape: tuple[int, ...]) -> tuple[Detection, ...]:
    return tuple(detect(np.frombuffer(pixels, np.uint8).reshape(shape)))


LITE_REWARDS: dict[str, type] = {one.name: one for one in (GenEvalReward, PartialCredit, Redness, Preference)}


def open_rewards(names: Sequence[str], timeout: float = 60, retries: int = 3, batch: int = 16) -> list[Reward]:
    """The rewards of a run.

    Args:
        names: of `LITE_REWARDS`, or addresses of reward servers, `http://HOST:PORT`, see `RemoteReward`.
        timeout, retries, batch: of the servers, see `RemoteReward`.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a server is not there or not ready.
    """
    return [_open(name, timeout, retries, batch) for name in names]


def _open(name: str, timeout: float, retries: int, batch: int) -> Reward:
    if name.startswith(("http://", "https://")):
        return RemoteReward(name, timeout, retries, batch)
    if name not in LITE_REWARDS:
        raise InvalidValue(f"rewards: {name!r} is unknown; there are {', '.join(LITE_REWARDS)}, or http://HOST:PORT")
    return LITE_REWARDS[name]()


# -- trust, and the sum


def check_scores(name: str, scores: np.ndarray, count: int, constant: bool = True) -> np.ndarray:
    """The scores as float64 (B,).

    Args:
        name: of the reward.
        scores: what it said.
        count: pictures it was shown.
        constant: also refuse a batch in which all scores are the same: nothing can be learned from it.

    Raises:
        FloatingPointError: a score is NaN or infinite.
        RuntimeError: too few or too many scores, something else than numbers, or all the same.
    """
    try:
        found = np.asarray(scores, np.float64)  # None, which is JSON's null, becomes NaN
    except (TypeError, ValueError):
        raise Unusable(f"reward {name}: {scores!r:.100} are no numbers") from None
    if found.shape != (count,):
        raise Unusable(f"reward {name}: {found.shape} scores for {count} pictures; must be one for each")
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).sum())
        raise NotFiniteScores(
            f"reward {name}: {bad} of {count} scores are NaN or infinite; look at the judge before going on"
        )
    if constant and count > 1 and np.ptp(found) == 0:
        raise Unusable(f"reward {name}: all {count} scores are {found[0]:g}; it tells no picture from another")
    return found


def preflight(rewards: Sequence[Reward], size: int = 128) -> dict[str, tuple[float, float]]:
    """Shows each reward a red circle, and a blue square in its place, when a red circle is asked for.

    A reward with `examples` of its own (prompt, pictures (2, H, W, 3)), the good one first, is shown those.

    Args:
        rewards: to try.
        size: of the pictures, pixels.

    Returns:
        By name: the scores of the good and of the bad picture.

    Raises:
        RuntimeError: a reward that does not prefer the good one, or cannot be asked.
        FloatingPointError: a score is not finite.
    """
    scene = true_scene(PREFLIGHT)
    wrong = dataclasses.replace(scene.objects[0], shape="square", color="blue", tint=COLORS["blue"])
    scenes = scene, dataclasses.replace(scene, objects=(wrong,))
    pictures = np.stack([render(one, size) for one in scenes])  # (2, H, W, 3)
    found = {}
    for reward in rewards:
        own = getattr(reward, "examples", None)
        prompt, shown = own or (PREFLIGHT, pictures)
        good, bad = check_scores(reward.name, reward.score(shown, [prompt] * 2), 2, constant=False)
        if good <= bad:
            names = ("its good picture", "its bad one") if own else ("a red circle", "a blue square")
            raise Unusable(
                f"reward {reward.name}: gives {names[0]} {good:g} and {names[1]} {bad:g} when asked for "
                f"{prompt.text!r}; it must prefer the first"
            )
        found[reward.name] = float(good), float(bad)
    return found


def add_rewards(scores: np.ndarray, weights: Sequence[float], normalize: bool) -> np.ndarray:
    """Several rewards in one.

    Args:
        scores: (B, R), a column for each reward.
        weights: R numbers.
        normalize: bring each column to mean 0 and deviation 1 first.

    Returns:
        float64 (B,).
    """
    scores = np.asarray(scores, np.float64)
    if normalize:
        scores = (scores - scores.mean(0)) / (scores.std(0) + EPS)
    return scores @ np.asarray(weights, np.float64)


# -- a judge elsewhere


class RemoteReward:
    """A reward that a server gives, see the module's essay.

    Args:
        url: `http://HOST:PORT`; several with commas between them are servers of the same judge that share the work:
            process number k begins with the k-th, and what one cannot answer is asked of the next.
        timeout: seconds that the server has to answer one request.
        retries: further attempts after one that failed; NaN is an answer and no failure.
        batch: pictures in one request.
        wait: seconds before the first further attempt, doubled each time.

    Attributes:
        examples: the prompt and the two pictures that its server asks to be shown in `preflight`; None: it names none.

    Raises:
        RuntimeError: the server is not there or not ready; also from `score`, when it dies or is too slow.
    """

    def __init__(self, url: str, timeout: float = 60, retries: int = 3, batch: int = 16, wait: float = 0.5):
        self.timeout, self.retries, self.batch, self.wait = timeout, retries, batch, wait
        self.urls, self.turn = [one.strip().rstrip("/") for one in url.split(",") if one.strip()], 0
        self._judge = ""  # its name, until which nobody knows it
        told = [self._ready(turn) for turn in range(len(self.urls))]
        if len(names := {one.get("name", "remote") for one in told}) > 1:
            raise Unusable(f"reward {url}: these serve different judges, {', '.join(sorted(map(str, names)))}")
        self.turn = rank_and_world()[0] % len(self.urls)
        more = f" and {len(self.urls) - 1} more" if len(self.urls) > 1 else ""
        self._judge = f"{names.pop()}@"
        self.name = f"{self._judge}{self.urls[0]}{more}"
        self.examples = self._examples(told[0].get("examples"))

    def _ready(self, turn: int) -> dict[str, Any]:
        """What server number `turn` says of itself; no other is asked in its place."""
        self.turn, self.name = turn, self.urls[turn]
        health = self._ask("/health", None, others=False)
        if not isinstance(health, dict) or health.get("ready") is not True:
            raise Unusable(f"reward {self.name}: is not ready, its /health says {health!r:.200}")
        return health

    def _examples(self, told: Any) -> tuple[Asked, np.ndarray] | None:
        if told is None:
            return None
        try:
            pictures = _from_png([told["good"], told["bad"]])  # (2, H, W, 3)
            return FilePrompt(check_entry(told["prompt"])), pictures
        except Exception as error:  # Pillow raises many kinds on damaged pictures
            raise Unusable(f"reward {self.name}: its /health has examples that cannot be read ({error})") from None

    def score(self, pictures: np.ndarray, prompts: Sequence[Asked]) -> np.ndarray:
        """The server's scores (B,); in a list of its own order, `batch` pictures a request."""
        scores: list[float] = []
        for first in range(0, len(prompts), self.batch):
            some, asked = pictures[first : first + self.batch], prompts[first : first + self.batch]
            request = {"images": [_to_png(one) for one in some], "prompts": [one.metadata() for one in asked]}
            answer = self._ask("/score", json.dumps(request).encode())
            said = answer.get("scores") if isinstance(answer, dict) else None
            if not isinstance(said, list):
                raise Unusable(f"reward {self._asked}: answered {answer!r:.200}; must be {{'scores': [...]}}")
            scores += check_scores(self._asked, said, len(asked), constant=False).tolist()
        return np.array(scores)

    @property
    def _asked(self) -> str:
        """The judge, and which of its servers was asked last."""
        return f"{self._judge}{self.urls[self.turn]}"

    def _ask(self, path: str, body: bytes | None, others: bool = True) -> Any:
        wait, tries = self.wait, self.retries + 1
        for attempt in range(tries):
            try:
                code, said = self._exchange(path, body)
                if code == 200:
                    return json.loads(said)
                reason = f"answered {code} {responses.get(code, '')}: {said.decode(errors='replace').strip()[:300]}"
            except TimeoutError:
                code, reason = 0, f"no answer within {self.timeout:g} s"
            except (OSError, json.JSONDecodeError) as error:  # no connection, half an answer
                code, reason = 0, f"cannot be asked ({error})"
            except Exception as error:  # http.client's own: no address, or an answer that breaks off
                code, reason = 0, f"cannot be asked ({type(error).__name__}: {error})"
            if 300 <= code < 500:  # the request is at fault, and would be again
                raise Unusable(f"reward {self._asked}: {reason}")
            if others and len(self.urls) > 1:
                reason = f"{self.urls[self.turn]} {reason}"
                self.turn = (self.turn + 1) % len(self.urls)
            if attempt < self.retries:
                time.sleep(wait)
                wait *= 2
        raise Unusable(
            f"reward {self.name}: {reason}; tried {tries} times. Start the server again; the run continues from its "
            "last checkpoint with --resume"
        )

    def _exchange(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        """One request: the answer's code and body, within `timeout` even where each of its bytes comes in time."""
        place = urlsplit(self.urls[self.turn])
        kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
        connection, late, line = kind(place.netloc, timeout=self.timeout), threading.Event(), None

        def cut() -> None:
            late.set()
            if line is not None:
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)  # whoever waits for a byte gets none

        timer = threading.Timer(self.timeout, cut)
        timer.start()
        try:
            connection.connect()
            line = connection.sock  # the connection itself forgets it when an answer begins
            if late.is_set():
                raise TimeoutError
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("GET" if body is None else "POST", place.path + path, body, headers)
            answer = connection.getresponse()
            found = answer.status, answer.read()
        except Exception:
            if not late.is_set():
                raise
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():  # also where an answer seems whole: headers that were cut off are taken for all of them
            raise TimeoutError
        return found


def _to_png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _from_png(texts: Sequence[str]) -> np.ndarray:
    """Pictures (B, H, W, 3) of PNGs in base64; none is unpacked before it is known how large all are."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) for text in texts]
    if (pixels := sum(picture.width * picture.height for picture in pictures)) > LARGEST_PICTURES:
        raise InvalidValue(f"images: {pixels:,} pixels, {LARGEST_PICTURES:,} at most")
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


class RewardServer(ThreadingHTTPServer):
    """Serves one reward; the reference for servers of rewards that live elsewhere.

    Args:
        reward: what it gives.
        host, port: where it listens; port 0 takes a free one. It knows no passwords: keep it on a trusted network.
        read_prompt: makes the reward's prompt from GenEval metadata; None: whatever these ask for.
    """

    daemon_threads = True

    def __init__(self, reward: Reward, host: str = "127.0.0.1", port: int = 0, read_prompt=None):
        self.reward, self.read_prompt = reward, read_prompt or (lambda entry: FilePrompt(check_entry(entry)))
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def health(self) -> dict[str, Any]:
        """What it says of itself: its reward's name, and the pictures that a `preflight` should show, if it has any."""
        told = {"name": self.reward.name, "ready": True}
        if own := getattr(self.reward, "examples", None):
            good, bad = map(_to_png, own[1])
            told["examples"] = {"prompt": own[0].metadata(), "good": good, "bad": bad}
        return told

    def answer(self, request: Any) -> dict[str, Any]:
        """The answer to a request for scores.

        Raises:
            ValueError: it is not one.
        """
        try:
            pictures = _from_png(request["images"])  # (B, H, W, 3)
            prompts = [self.read_prompt(entry) for entry in request["prompts"]]
        except Exception as error:  # Pillow raises many kinds on damaged pictures
            raise InvalidValue(f"needs images (PNG in base64, of one size) and prompts: {error}") from error
        if len(pictures) != len(prompts):
            raise InvalidValue(f"{len(pictures)} images, {len(prompts)} prompts: must be equally many")
        scores = np.asarray(self.reward.score(pictures, prompts), np.float64).tolist()
        return {"scores": [score if math.isfinite(score) else None for score in scores]}  # NaN is not JSON


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds that a client may be silent within its request

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, self.server.health())
        else:
            self._send(404, {"error": "there are GET /health and POST /score"})

    def do_POST(self) -> None:
        told = self.headers.get("Content-Length")
        length = int(told) if re.fullmatch("[0-9]{1,18}", told or "") else 0
        if self.path != "/score" or not 0 < length <= LARGEST_REQUEST:
            self.close_connection = True
            code = 404 if self.path != "/score" else 411 if told is None else 413 if length else 400
            self._send(code, {"error": f"POST /score, with a Content-Length from 1 to {LARGEST_REQUEST} bytes"})
            return
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            self.close_connection = True
            self._send(408, {"error": f"no more came for {self.timeout} s, Content-Length says {length} bytes"})
            return
        try:
            if len(body) < length:
                raise InvalidValue(f"{len(body)} bytes came, Content-Length says {length}")
            self._send(200, self.server.answer(read_json_line(body)))
        except ValueError as error:
            self._send(400, {"error": explain_json(error)})
        except Exception as error:  # the judge itself failed: say so and go on serving
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def _send(self, code: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # whoever asked has gone

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: a run asks thousands of times."""
