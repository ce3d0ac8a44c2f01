"""Putting a trained transformer, or the vision model of REPA, into a folder of shipped weights.

A shipped folder is a diffusers pipeline in float16 with a model card for each part and one list of checksums. The
encoders in it stay as they are, byte for byte: cached latents and every transformer trained on them depend on them.
The vision model lies beside the pipeline, which does not need it.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nitro_e_lite import files
from nitro_e_lite.errors import InvalidValue, NotFinite, NotWritten
from nitro_e_lite.files import (
    MANIFEST,
    STUDENTS,
    atomic_folder,
    check_manifest,
    check_output,
    check_replaceable,
    find_weights,
    only_writer,
    read_json,
    read_jsonl,
    read_run,
    write_manifest,
)
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.loading import ADAPTER, base_hash, load_pipeline, load_transformer
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.inference.vision import load_vision
from nitro_e_lite.model.adapters import read_safetensors
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel


def ship_student(source: str | Path, name: str) -> Path:
    """Puts what was made from "lite" beside it, as its run without checkpoints.

    Args:
        source: a finished run of `nitro-e train distill` or `sprint` with the encoders "lite", or of `rewards` from it;
            also one of `nitro-e reproduce`, whose folders held the same weights.
        name: of the shipped weights, or a folder.

    Returns:
        The folder: `config.json` says how it was trained and draws, `final/` holds in float16 the student's transformer
        or the adapter of `rewards`.

    Raises:
        ValueError: `source` is no such run, or of another stage than the name says.
        FloatingPointError: its weights are not finite in float16.
        FileExistsError: the folder holds other things.
    """
    run = Path(source) / "config.json"
    about = read_run(run)
    trained = about.get("config") or {}
    rewards, data = trained.get("stage") == "rewards", trained.get("data")
    data = data if isinstance(data, dict) else {}
    if trained.get("stage") not in STUDENTS.values() or not _made_from_lite(about, rewards, data):
        rule = "is no run of distill or sprint with encoders lite, or of rewards that started from lite"
        raise InvalidValue(f"source={str(source)!r}: {rule}")
    if trained["stage"] != STUDENTS.get(name, trained["stage"]):
        raise InvalidValue(f"name={name!r}: is of the stage {STUDENTS[name]}, {source} is a run of {trained['stage']}")
    folder = files.weights_dir() / name if name in STUDENTS else Path(name)
    check_output(folder, "folder")
    check_replaceable(folder, MANIFEST)
    if not run.with_name("metrics.jsonl").is_file():
        raise InvalidValue(f"source={str(source)!r}: is no finished run, for metrics.jsonl is missing")
    if rewards:  # no paths of a machine
        trained |= {"start_from": "lite"}
    else:
        drawn = [f"data/{Path(one).name}" for one in data.get("folders", ())]
        trained |= {"data": data | {"encoders": "lite", "folders": drawn}}
        trained |= {name: _shipped_name(trained[name]) for name in ("teacher", "start_from") if name in trained}
    about |= {"config": trained}
    about.pop("hosts", None)
    about["config"] = _without_folders(about["config"])
    with atomic_folder(folder, "the run is intact") as partial:
        if rewards:
            adapter = find_weights(source, ADAPTER)
            half = {key: value.half() for key, value in read_safetensors(adapter / ADAPTER).items()}
            _check_finite(source, half)
            shutil.copytree(adapter, partial / "final")
            save_file(half, partial / "final" / ADAPTER, {"format": "pt"})
        else:
            _half(source).save_pretrained(partial / "final")
        (partial / run.name).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(run.with_name("metrics.jsonl"), partial / "metrics.jsonl")
        write_manifest(partial)
    return folder


def _made_from_lite(about: dict[str, Any], rewards: bool, data: dict[str, Any]) -> bool:
    """Whether a run started from the shipped "lite", or read its encoders, by name or by the weights."""
    if rewards:
        said, base = about["config"].get("start_from"), about.get("base")
        return said == "lite" or (base is not None and base == base_hash(load_pipeline("lite", "cpu")))
    said, encoders = data.get("encoders"), about.get("encoders")
    return said == "lite" or (encoders is not None and encoders == load_encoders("lite").fingerprint)


def _shipped_name(source: str) -> str:
    """The name under which a run ships, where `source` is the folder of one."""
    about = read_run(Path(source) / "config.json") if source else {}
    stage = (about.get("config") or {}).get("stage")
    return next((name for name, own in STUDENTS.items() if own == stage), source)


def ship(
    source: str | Path,
    name: str = "lite",
    *,
    steps: int = 20,
    guidance: float | None = None,
    shift: float | None = None,
) -> Path:
    """Replaces the transformer of shipped weights, or the vision model when `source` is one.

    Args:
        source: a training run, its `final/` folder, or anything else `load_transformer` or `load_vision` takes.
        name: of the shipped weights, or a folder; must hold the encoders.
        steps: sampler steps of a call that names none.
        guidance, shift: of the sampler likewise; not given: those of the run's own sample grids, or of the pipeline.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there is no such folder.
        EncoderUnavailable: the folder holds no encoders.
        ValueError: transformer and encoders do not fit or were not trained together, what stays in the folder differs
            from its checksums, nobody says how strong guidance and shift are, or the run's student needs another
            sampler than the folder's.
        FloatingPointError: the weights are not finite in float16.
    """
    folder = find_weights(name)
    check_output(folder, "folder")
    vision = _is_vision(Path(source))
    if (folder / MANIFEST).is_file():  # no fresh checksums for damaged files
        replaced = {"vision"} if vision else {"transformer", "scheduler", "model_index.json"}
        check_manifest(folder, *{part.name for part in folder.iterdir()} - replaced)
    if vision:
        return _ship_vision(Path(source), folder)
    run = Path(source) / "config.json"  # of a training run; the folder `final` has a model's
    trained = read_run(run).get("config") or {}
    if trained.get("stage") in ("distill", "sprint"):
        own = {stage: one for one, stage in STUDENTS.items()}[trained["stage"]]
        raise InvalidValue(f"source={str(source)!r}: its student needs a sampler of its own; ship it as {own}")
    transformer, encoders = _half(source), load_encoders(folder)
    if read_run(run).get("encoders", encoders.fingerprint) != encoders.fingerprint:
        raise InvalidValue(f"source={str(source)!r}: was trained with other encoders than those of {folder}")
    pipeline = NitroEPipeline(
        transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        **encoders.parts(),
        default_steps=steps,
        default_guidance=_usual(source, trained, "guidance") if guidance is None else guidance,
        default_shift=_usual(source, trained, "shift") if shift is None else shift,
    )
    beside = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".ship-")
    with only_writer(folder), beside as temporary:
        new = Path(temporary) / "new"
        try:  # a full disk spoils nothing
            pipeline.save_pretrained(new)
        except SafetensorError as error:
            raise NotWritten(f"{folder}: could not be written ({error}); what is there is intact") from error
        parts = [file for part in ("transformer", "scheduler") for file in (new / part).iterdir()]
        if trained:  # how it was trained travels with it
            stages, rows = record(run.parent)
            texts = {
                "training.json": json.dumps({"stages": stages}, indent=1) + "\n",
                "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            }
            for file, text in texts.items():
                (new / "transformer" / file).write_text(text, encoding="utf-8")
                parts.append(new / "transformer" / file)
        for file in (*parts, new / "model_index.json"):
            target = folder / file.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
        if not trained:  # how the one before was trained does not stay
            for name in ("training.json", "metrics.jsonl"):
                (folder / "transformer" / name).unlink(missing_ok=True)
        write_manifest(folder)
    return folder


def record(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How a model came to be: a training run, and before it the run that it started from, and so on.

    Args:
        run: folder of a training run.

    Returns:
        Settings of each stage, the earliest first, of a machine's folders the last two names; and rows of all metrics,
        in which steps, samples and seconds count on from stage to stage and `stage` says which it is.
    """
    trained = read_run(Path(run) / "config.json").get("config") or {}
    stages, rows = _before(str(trained.get("start_from") or ""))
    if stages and stages[-1] == _without_folders(trained):  # it started from what it has become, and ships again
        return stages, rows
    counts = ("step", "samples", "seconds")
    before = {name: max((row[name] for row in rows if name in row), default=0) for name in counts}
    for row in read_jsonl(Path(run) / "metrics.jsonl"):
        counted = {name: round(row[name] + before[name], 3) for name in counts if name in row}
        rows.append({"stage": trained["stage"], **row, **counted})
    return [*stages, _without_folders(trained)], rows


def _before(start: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The record of what a run started from: another run, a pipeline, or nothing that says how it was trained."""
    folder = files.weights_dir() / start if (files.weights_dir() / start).is_dir() else Path(start)
    for run in (folder, folder.parent) if start else ():  # or its `final/`
        if run.joinpath("metrics.jsonl").is_file() and read_run(run / "config.json").get("config"):
            return record(run)
    for part in (folder / "transformer", folder) if start else ():
        if (part / "training.json").is_file() and (part / "metrics.jsonl").is_file():
            told = read_json(part / "training.json")
            return told.get("stages", [told]), list(read_jsonl(part / "metrics.jsonl"))
    return [], []


def _without_folders(value: Any) -> Any:
    """The same settings, of each absolute path the last two names."""
    if isinstance(value, dict):
        return {name: _without_folders(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return "/".join(Path(value).parts[-2:]) if isinstance(value, str) and Path(value).is_absolute() else value


def _half(source: str | Path) -> EMMDiTTransformer2DModel:
    """The transformer in float16; its configuration says nothing of the folder that it came from."""
    trained = load_transformer(source)
    model = EMMDiTTransformer2DModel.like(trained)
    model.load_state_dict(trained.state_dict())
    model.half()
    _check_finite(source, model.state_dict())
    return model


def _check_finite(source: str | Path, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if not value.isfinite().all():
            raise NotFinite(f"source={str(source)!r}: {name} is not finite in float16; the run has come to nothing")


def _usual(source: str | Path, trained: dict, field: str) -> Any:
    """What a run, or a pipeline, says of "guidance" or "shift"; nothing is taken for granted."""
    indices = [root / source / "model_index.json" for root in (Path(), files.weights_dir())]
    index = next((path for path in indices if path.is_file() and not trained), None)
    said = trained.get(field) if index is None else read_json(index).get(f"default_{field}")
    if said is None:
        raise InvalidValue(f"{field}: {source} does not say which it draws with; give --{field}")
    return said


def _is_vision(source: Path) -> bool:
    configs = [f for f in (source / "final" / "config.json", source / "config.json") if f.is_file()]
    return bool(configs) and read_json(configs[0]).get("model_type") == "dinov2"


def _ship_vision(source: Path, folder: Path) -> Path:
    """Model in float16, its probe and its metrics; a card that is there stays."""
    model = load_vision(source).model.half()
    with only_writer(folder):
        with atomic_folder(folder / "vision", "what was there is intact") as partial:
            if (folder / "vision").is_dir():
                shutil.copytree(folder / "vision", partial, dirs_exist_ok=True)
            model.save_pretrained(partial)
            for file in (source / "final" / "probe.json", source / "metrics.jsonl"):
                if file.is_file():
                    shutil.copyfile(file, partial / file.name)
        write_manifest(folder)
    return folder
