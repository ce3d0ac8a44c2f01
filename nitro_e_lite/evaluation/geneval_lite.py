"""GenEval-lite scores of a pipeline, with everything needed to get the same number again.

A score without its recipe cannot be checked, so the result is a *card*: the hash of the weights, the sampler,
steps, guidance, seeds, number type, prompts expected and judged, and the environment, beside the score.
Tables and figures are made from cards.

Every picture has a generator of its own, seeded from its seed number and the place of its prompt in the list;
the batch size therefore changes nothing but speed, and `nitro-e sample --seed` draws any one of them again.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from nitro_e_lite import runtime
from nitro_e_lite.errors import FileThere, InvalidValue
from nitro_e_lite.evaluation.appearance import Appearance
from nitro_e_lite.files import read_jsonl, write_atomically
from nitro_e_lite.inference.arguments import as_integer, seeded_generators
from nitro_e_lite.inference.encoders import LatentStats, decode_latents, encode_images, images_to_tensor
from nitro_e_lite.inference.hub import weights_hash
from nitro_e_lite.inference.pipeline import NitroEPipeline, Sampler
from nitro_e_lite.model.fp8 import count_bytes
from nitro_e_lite.scenes.geneval import CATEGORIES, Prompt, Score, Verdict, score, true_scene, verify
from nitro_e_lite.scenes.render import render
from nitro_e_lite.scenes.verifier import VERSION
from nitro_e_lite.stats import share_interval
from nitro_e_lite.viz import image_grid, save_image

UNSURE = "unsure"  # what eyes may also say
PSNR_PICTURES = 60
ROW = {"path": str, "prompt": str, "tag": str, "verifier": bool, "reason": str, "why": str, "steps": int}  # of a sheet
SEED_STRIDE = 1_000_000  # picture seed = SEED_STRIDE * seed + place of the prompt


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        score: overall, interval, category means, number of images.
        card: the score and its recipe as plain JSON.
        prompts, verdicts: prompt and verdict of each picture, seed by seed.
        images: uint8 `(H, W, 3)` each, when they were asked for.
    """

    score: Score
    card: dict[str, Any]
    prompts: list[Prompt]
    verdicts: list[Verdict]
    images: list[np.ndarray]

    def grid(self, each: int = 8) -> Image.Image:
        """The first pictures of every category with caption and verdict: nothing chosen, nothing left out.

        Args:
            each: pictures a category, one row.

        Raises:
            ValueError: when the evaluation kept no images.
        """
        if not self.images:
            raise InvalidValue("images: this evaluation kept none; ask for keep_images=True")
        rows = [[i for i, p in enumerate(self.prompts) if p.tag == c][:each] for c in self.score.categories]
        chosen = [i for row in rows for i in row]
        labels = [f"{'✓' if self.verdicts[i].correct else '✗'} {self.prompts[i].text}" for i in chosen]
        return image_grid([self.images[i] for i in chosen], columns=max(map(len, rows)), labels=labels)

    def review(self, folder: str | Path, count: int = 200, seed: int = 0) -> Path:
        """Writes pictures for a person to look at, drawn at random over both verdicts, and a sheet to fill in.

        Args:
            folder: for the pictures and the sheet, see `write_sheet`.
            count: of pictures; as many right as wrong ones, as far as there are.
            seed: of the draw.

        Returns:
            The sheet; `agreement` reads it.

        Raises:
            ValueError: the evaluation kept no images.
            FileExistsError: a sheet is there already.
        """
        if not self.images:
            raise InvalidValue("images: this evaluation kept none; ask for keep_images=True")
        order = np.random.default_rng(seed).permutation(len(self.images)).tolist()
        right, wrong = ([k for k in order if self.verdicts[k].correct == kind] for kind in (True, False))
        few = min(len(right), len(wrong), count // 2)
        chosen = (right[: count - few] + wrong[: max(few, count - len(right))])[:count]
        chosen = sorted(chosen, key=order.index)
        asked, found = ([some[k] for k in chosen] for some in (self.prompts, self.verdicts))
        return write_sheet(folder, [self.images[k] for k in chosen], asked, found)

    def save(self, path: str | Path) -> Path:
        """Writes the card as JSON."""
        path = Path(path)
        write_atomically(path, json.dumps(self.card, indent=2) + "\n")
        return path


def new_sheet(folder: str | Path) -> Path:
    """Where `write_sheet` writes its sheet.

    Raises:
        FileExistsError: a sheet is there already, or pictures by the names of its own.
    """
    sheet = Path(folder) / "review.jsonl"
    for path in (sheet, *Path(folder).glob("[0-9][0-9][0-9].png")):
        if path.exists():
            raise FileThere(f"{path}: is there already; name another folder")
    return sheet


def write_sheet(
    folder: str | Path, images: Sequence[np.ndarray], prompts: Sequence[Prompt], verdicts: Sequence[Verdict]
) -> Path:
    """Writes pictures as `000.png`, ... and `review.jsonl`, where a person fills in `eyes` and `why`.

    Raises:
        FileExistsError: a sheet is there already.
    """
    rows, sheet = [], new_sheet(folder)
    for number, (image, prompt, verdict) in enumerate(zip(images, prompts, verdicts, strict=True)):
        path = save_image(Image.fromarray(image), Path(folder) / f"{number:03d}.png", {"prompt": prompt.text})
        facts = {"path": path.name, "prompt": prompt.text, "tag": prompt.tag, "eyes": None, "why": ""}
        rows.append(facts | {"verifier": verdict.correct, "reason": verdict.reason})
    write_atomically(sheet, "".join(json.dumps(row) + "\n" for row in rows))
    return sheet


def agreement(sheet: str | Path) -> dict[str, Any]:
    """`tally` of a filled-in sheet of `write_sheet`."""
    return tally(read_sheet(sheet), sheet)


def read_sheet(sheet: str | Path) -> list[dict[str, Any]]:
    """The rows of a sheet that a person filled in.

    Raises:
        ValueError: a line is no JSON object.
    """
    return list(read_jsonl(sheet, torn_last_line="counts"))


def tally(rows: Sequence[dict[str, Any]], name: str | Path = "rows") -> dict[str, Any]:
    """What eyes say of the verifier: true, false or "unsure" for each picture.

    Args:
        rows: those of `write_sheet`, with `eyes` and `why` filled in; `steps` may be there.
        name: of the rows, for errors.

    Returns:
        `looked` at, `unsure`, `agree`, `low` and `high` (95 % interval of the share that agrees, where eyes were sure),
        and `disagree`, those rows.

    Raises:
        ValueError: no pictures, one twice, one that nobody has looked at, a disagreement without a reason, or a field
            that is not as it was written.
    """
    if not rows:
        raise InvalidValue(f"{name}: holds no pictures")
    seen: set[str] = set()
    for row in rows:
        for field, kind in ROW.items():
            value = row.get(field, 0 if field == "steps" else None)
            if not isinstance(value, kind):
                raise InvalidValue(f"{name}: {row.get('path')!r:.80}: {field}={value!r:.80}: must be as it was written")
        if row["tag"] not in CATEGORIES:
            raise InvalidValue(f"{name}: {row['path']}: tag={row['tag']!r:.80}: must be one of {', '.join(CATEGORIES)}")
        if not isinstance(row.get("eyes"), bool) and row.get("eyes") != UNSURE:
            raise InvalidValue(f"{name}: {row['path']}: eyes must be true or false, or {UNSURE!r}")
        if row["eyes"] != row["verifier"] and not row["why"].strip():
            raise InvalidValue(f"{name}: {row['path']}: eyes and verifier disagree; say why")
        if row["path"] in seen:
            raise InvalidValue(f"{name}: {row['path']}: is there twice")
        seen.add(row["path"])
    sure = [row for row in rows if row["eyes"] != UNSURE]
    disagree = [row for row in sure if row["eyes"] != row["verifier"]]
    low, high = share_interval(len(sure) - len(disagree), len(sure)) if sure else (0.0, 1.0)
    counts = {"looked": len(rows), "unsure": len(rows) - len(sure), "agree": len(sure) - len(disagree)}
    return counts | {"low": low, "high": high, "disagree": disagree}


def picture_seed(seed: int, place: int) -> int:
    """The seed of the picture of prompt number `place` in repetition `seed`."""
    return SEED_STRIDE * seed + place


def evaluate(
    pipeline: NitroEPipeline,
    prompts: Sequence[Prompt],
    *,
    seeds: Sequence[int] = (0, 1),
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    batch_size: int = 25,
    keep_images: bool = False,
    appearance: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Draws every prompt with every seed and judges the pictures.

    Args:
        pipeline: what to score.
        prompts: what to draw.
        seeds: repetitions, each a number >= 0.
        steps, guidance, shift: of the sampler; the pipeline's own when not given.
        batch_size: pictures drawn at once.
        keep_images: also return the pictures.
        appearance: also say how the pictures look and how alike they are, see `evaluation/appearance.py`.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        TypeError, ValueError: no prompts, no seeds, a repeated or negative seed, a batch size below 1.
    """
    if not prompts:
        raise InvalidValue("prompts: empty; expected at least one")
    seeds = [as_integer(f"seeds[{index}]", seed, 0) for index, seed in enumerate(seeds)]
    if not seeds or len(set(seeds)) != len(seeds):
        raise InvalidValue(f"seeds: {seeds} must be at least one number, each once")
    batch_size = as_integer("batch_size", batch_size, 1)
    sampler = pipeline.sampler(steps, guidance, shift)
    jobs = [(prompt, picture_seed(seed, place)) for seed in seeds for place, prompt in enumerate(prompts)]
    verdicts, images, start = [], [], time.perf_counter()
    looks = Appearance() if appearance else None
    with tqdm(total=len(jobs), desc="evaluating", unit="image", disable=None if progress else True) as bar:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            pictures = draw(pipeline, [(prompt.text, seed) for prompt, seed in batch], sampler)
            verdicts += [verify(picture, prompt) for picture, (prompt, _) in zip(pictures, batch, strict=True)]
            images += pictures if keep_images else []
            if looks is not None:
                looks.look(np.stack(pictures), [prompt for prompt, _ in batch])
            bar.update(len(batch))
    seconds = time.perf_counter() - start
    asked = [prompt for prompt, _ in jobs]
    result = score(asked, verdicts)
    recipe = {"seconds": round(seconds, 2), "seeds": seeds, **dataclasses.asdict(sampler)}
    recipe |= {"prompts": len(prompts), "images_expected": len(prompts) * len(seeds), "verifier": VERSION}
    recipe["verdicts"] = "".join(str(int(verdict.correct)) for verdict in verdicts)  # one a picture, seed by seed
    card = {"kind": "geneval_lite"} | dataclasses.asdict(result) | recipe | describe(pipeline)
    if looks is not None:
        card["appearance"] = looks.found(prompts, len(seeds), [verdict.correct for verdict in verdicts])
    return Evaluation(result, card, asked, verdicts, images)


def draw(pipeline: NitroEPipeline, jobs: Sequence[tuple[str, int]], sampler: Sampler) -> list[np.ndarray]:
    """Pictures of (caption, seed) pairs, uint8 `(H, W, 3)` each, without a progress bar of their own."""
    bar = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        output = pipeline(
            [caption for caption, _ in jobs],
            **sampler.arguments(),
            generator=seeded_generators(seed for _, seed in jobs),
            output_type="np",
        )
    finally:
        pipeline.set_progress_bar_config(**bar)
    return list((output.images * 255).round().astype(np.uint8))


def autoencoder_ceiling(vae: nn.Module, stats: LatentStats, prompts: Sequence[Prompt], seed: int = 55) -> dict:
    """What no model on the latents of an autoencoder can surpass: true scenes, encoded, decoded and judged.

    Returns:
        `overall`, `low` and `high` of GenEval-lite, `psnr`, the mean over the scenes in dB, and how many `images`.
    """
    verdicts, decibels = [], []
    for first in range(0, len(prompts), 10):
        part = prompts[first : first + 10]
        images = np.stack([render(true_scene(prompt, seed)) for prompt in part])
        decoded = decode_latents(vae, encode_images(vae, images, stats), stats)  # (B, 3, H, W) in [-1, 1]
        pixels = ((decoded + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
        verdicts += [verify(picture, prompt) for picture, prompt in zip(pixels, part, strict=True)]
        error = (decoded - images_to_tensor(images)).square().mean(dim=(1, 2, 3))
        decibels += (-10 * (error / 4).log10()).tolist()
    found = score(prompts, verdicts)
    told = {"overall": found.overall, "low": found.low, "high": found.high}
    return told | {"psnr": float(np.mean(decibels)), "images": found.images}


def psnr_of(pipeline: NitroEPipeline, exact: NitroEPipeline, prompts: Sequence[Prompt], **sampler: Any) -> dict:
    """How near the pictures of one pipeline come to those of another from the same noises, in dB.

    Args:
        pipeline, exact: the two.
        prompts: one picture each, those of the first seed.
        **sampler: `steps`, `guidance` and `shift` of both; the pipeline's own when not given.

    Returns:
        `pictures`, and of their PSNR `median`, `low` and `high` (90 % lie between); equal pictures count as 100 dB.
    """
    jobs = [(prompt.text, picture_seed(0, place)) for place, prompt in enumerate(prompts)]
    jobs = jobs[:: max(1, len(jobs) // PSNR_PICTURES)]
    first, second = (np.stack(draw(one, jobs, pipeline.sampler(**sampler))) / 255 for one in (pipeline, exact))
    errors = np.square(first - second).mean(axis=(1, 2, 3))
    low, median, high = np.quantile(-10 * np.log10(np.maximum(errors, 1e-10)), (0.05, 0.5, 0.95)).tolist()
    return {"pictures": len(jobs), "median": median, "low": low, "high": high}


def describe(pipeline: NitroEPipeline) -> dict[str, Any]:
    """What a score depends on besides prompts, seeds and sampler settings, as plain JSON."""
    parts = {name: getattr(pipeline, name) for name in ("transformer", "vae", "text_encoder")}
    return {
        "sampler": type(pipeline.scheduler).__name__,
        "sigma_grid": pipeline.config.sigma_grid,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "device": str(pipeline.device),
        "weights_sha256": weights_hash(parts),
        "transformer_parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
        "transformer_bytes": count_bytes(pipeline.transformer).total,
        **({"fp8": report.rung} if (report := getattr(pipeline.transformer, "fp8_report", None)) else {}),
        "environment": runtime.environment_report(),
    }
