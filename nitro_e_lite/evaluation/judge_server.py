"""Serves GenEval or HPSv2.1 as a reward, in the tool's own environment, where only this one file is needed.

    python judge_server.py geneval --script geneval/evaluation/evaluate_images.py --models DETECTOR_FOLDER --port 8901 \
        --good dog.png --bad cat.png --prompt '{"tag": "single_object", "include": [{"class": "dog", "count": 1}],
        "prompt": "a photo of a dog"}'
    python judge_server.py hpsv2 --port 8902

It speaks what `rewards.RemoteReward` asks for, imports nothing of this package, and runs on Python 3.8 with the tool
and Pillow. GenEval's functions are called as the tool's own script calls them; HPSv2's checkpoint is read once, where
the tool reads it for each call. A run shows every judge a good and a bad picture first. A detector of everyday things
knows no red circles, so `--good`, `--bad` and `--prompt` give it its own, and `/health` hands them on.

Neither tool is here: what is tested is the wire and how the tools are called, with stand-ins for them.

Source: djghosh13/geneval, tgxs002/HPSv2.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import math
import re
import select
import socket
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

LARGEST_REQUEST = 2**28  # bytes
LARGEST_PICTURES = 2**28  # pixels of all pictures in a request
GENEVAL = {  # what the script's last lines set: defaults of its own options
    "THRESHOLD": 0.3,
    "COUNTING_THRESHOLD": 0.9,
    "MAX_OBJECTS": 16,
    "NMS_THRESHOLD": 1.0,
    "POSITION_THRESHOLD": 0.1,
}


def geneval(script: str, models: str):
    """GenEval's verdict: 1 for a picture that shows what its metadata ask for, else 0.

    Args:
        script: `evaluate_images.py` of its repository.
        models: folder of the detector's weights.
    """
    spec = importlib.util.spec_from_file_location("evaluate_images", script)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    before, sys.argv = sys.argv, [script, ".", "--model-path", models]
    try:
        tool.args = tool.parse_args()
    finally:
        sys.argv = before
    tool.object_detector, (tool.clip_model, tool.transform, tool.tokenizer), tool.classnames = tool.load_models(
        tool.args
    )
    for name, value in GENEVAL.items():
        setattr(tool, name, value)

    def score(pictures: list, prompts: list) -> list:
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for picture, prompt in zip(pictures, prompts):  # noqa: B905  Python 3.8 knows no strict
                path = str(Path(folder, "00000.png"))
                picture.save(path)
                found.append(float(tool.evaluate_image(path, prompt)["correct"]))
        return found

    return score


def hpsv2():
    """HPSv2.1 of a picture and its prompt."""
    import huggingface_hub
    import torch
    from hpsv2 import img_score as tool
    from hpsv2.utils import hps_version_map

    tool.initialize_model()
    model, prepare = tool.model_dict["model"], tool.model_dict["preprocess_val"]
    path = huggingface_hub.hf_hub_download("xswu/HPSv2", hps_version_map["v2.1"])
    model.load_state_dict(torch.load(path, map_location=tool.device, weights_only=True)["state_dict"])
    model, tokenizer = model.to(tool.device).eval(), tool.get_tokenizer("ViT-H-14")

    def score(pictures: list, prompts: list) -> list:
        images = torch.stack([prepare(picture) for picture in pictures]).to(tool.device)
        texts = tokenizer([prompt["prompt"] for prompt in prompts]).to(tool.device)
        with torch.no_grad(), torch.autocast("cuda", enabled=torch.device(tool.device).type == "cuda"):
            said = model(images, texts)
        return (said["image_features"].float() * said["text_features"].float()).sum(-1).tolist()

    return score


class Handler(BaseHTTPRequestHandler):
    """`GET /health` and `POST /score`, see `rewards.py`; `score` and `health` are set on the class before it serves."""

    timeout = 60
    one_at_a_time = threading.Lock()  # a tool is no program for several threads

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, self.health)
        else:
            self.answer(404, {"error": "there are GET /health and POST /score"})

    def do_POST(self) -> None:
        told = self.headers.get("Content-Length") or "0"
        length = int(told) if re.fullmatch("[0-9]{1,18}", told) else 0
        if self.path != "/score" or not 0 < length <= LARGEST_REQUEST:
            self.close_connection = True
            return self.answer(400, {"error": f"POST /score with 1 to {LARGEST_REQUEST} bytes"})
        try:
            request = json.loads(self.rfile.read(length))
            pictures = open_pictures(request["images"])
            prompts = request["prompts"]
            if len(pictures) != len(prompts):
                raise ValueError(f"{len(pictures)} images, {len(prompts)} prompts")
        except Exception as error:  # Pillow raises many kinds
            return self.answer(400, {"error": f"needs images (PNG in base64) and prompts: {error}"})
        try:
            with self.one_at_a_time:
                if self.is_left():  # and has asked again: judging for nobody would make all others wait for ever
                    self.close_connection = True
                    return None
                scores = type(self).score(pictures, prompts)
        except Exception as error:  # the tool failed: say so and go on serving
            return self.answer(500, {"error": f"{type(error).__name__}: {error}"})
        self.answer(200, {"scores": [one if math.isfinite(one) else None for one in scores]})  # NaN is not JSON

    def is_left(self) -> bool:
        """Whether who asked has gone, as after a time-out."""
        try:
            heard, _, _ = select.select([self.connection], [], [], 0)
            return bool(heard) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def answer(self, code: int, said: dict) -> None:
        """Sends JSON to whoever is still there."""
        body = json.dumps(said).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *arguments) -> None:
        """Says nothing: a run asks thousands of times."""


class Server(ThreadingHTTPServer):
    """Answers all at once, and lets many wait: every process of a run asks at the same time."""

    daemon_threads = True
    request_queue_size = 128


def open_pictures(texts: list) -> list:
    """PNGs in base64; none is unpacked before it is known how large all are."""
    found = [Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) for text in texts]
    if sum(picture.width * picture.height for picture in found) > LARGEST_PICTURES:
        raise ValueError(f"more than {LARGEST_PICTURES} pixels")
    return [picture.convert("RGB") for picture in found]


def main() -> None:
    """Loads the tool, says where it listens, serves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("judge", choices=["geneval", "hpsv2"])
    parser.add_argument("--script", help="GenEval's evaluate_images.py")
    parser.add_argument("--models", help="folder of GenEval's detector")
    parser.add_argument("--host", default="127.0.0.1", help="it knows no passwords: keep it on a trusted network")
    parser.add_argument("--port", type=int, default=8901)
    parser.add_argument("--good", help="a PNG that shows what --prompt asks for; GenEval needs the three")
    parser.add_argument("--bad", help="one that does not, of the same size")
    parser.add_argument("--prompt", type=json.loads, help="GenEval metadata")
    asked = parser.parse_args()
    examples = [asked.good, asked.bad, asked.prompt]
    if asked.judge == "geneval" and None in [asked.script, asked.models, *examples]:
        parser.error("geneval needs --script, --models, --good, --bad and --prompt")
    if asked.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Warning: --host {asked.host} lets anyone who can reach this machine send requests", file=sys.stderr)
    Handler.health = {"name": asked.judge, "ready": True}
    if None not in examples:
        good, bad = (base64.b64encode(Path(path).read_bytes()).decode() for path in (asked.good, asked.bad))
        if len({picture.size for picture in open_pictures([good, bad])}) > 1:
            parser.error("--good and --bad must be of the same size")
        Handler.health["examples"] = {"prompt": asked.prompt, "good": good, "bad": bad}
    Handler.score = staticmethod(geneval(asked.script, asked.models) if asked.judge == "geneval" else hpsv2())
    with Server((asked.host, asked.port), Handler) as server:
        print(f"serving {asked.judge} at http://{asked.host}:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
