"""What a run needs, looked at before it costs anything.

A run of days fails in its first minute or in its last: a folder that nobody has encoded, a disk that holds two
checkpoints of three, a licence that was never accepted, eight processes on a machine without a GPU. `preflight` looks
for all of it in seconds and says what to do; `require` prints the findings and ends the notebook where something is
missing that the run cannot do without.

The stages of the transformer are looked at in full, students of few steps all but their memory, and of learning from
rewards the prompts and every judge. Any other stage gets what its settings have in common with them (start, processes,
disk); it adds findings of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from nitro_e_lite.config import RewardConfig, RunConfig, StudentConfig, TrainConfig
from nitro_e_lite.data.shards import array_shapes, read_card, sidecars
from nitro_e_lite.errors import Unusable, UserError
from nitro_e_lite.evaluation import rewards
from nitro_e_lite.evaluation.official_geneval import read_metadata
from nitro_e_lite.experiments import handshake, launch
from nitro_e_lite.experiments.plan import PICTURES, checkpoint_bytes, frozen_encoders, plan, snapshot_bytes
from nitro_e_lite.files import find_weights, read_json
from nitro_e_lite.inference.hub import FULL_AUTOENCODER, FULL_TEXT_ENCODER, HUB_REVISIONS, OFFICIAL
from nitro_e_lite.inference.loading import ADAPTER
from nitro_e_lite.inference.vision import VISION_FILES, VISION_REVISIONS
from nitro_e_lite.model.flops import HARDWARE
from nitro_e_lite.presets import preset
from nitro_e_lite.runtime import attention_backend, device_name, pick_device

ROOM = 0.9  # of a device's memory that a plan may fill: allocator and libraries take their part
SCRATCH = 2e9  # bytes on the disk for metrics, pictures and the console


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        fine: whether it is as it should be.
        says: what was found, and what to do where it is not fine.
        must: whether the run cannot do without it.
    """

    name: str
    fine: bool
    says: str
    must: bool = True


def preflight(
    config: RunConfig, run_dir: str | Path, processes: int = 1, device: str | None = None, made_before: bool = False
) -> list[Finding]:
    """Looks for everything that a run needs.

    Args:
        config: of the run.
        run_dir: its folder; need not be there.
        processes: on this machine, one for each accelerator.
        device: "cpu", "cuda" or None for the best there is.
        made_before: its first weights (`start_from`) come from a run that is yet to be made.
    """
    found = [*_devices(config, processes, device)]
    found += _exchange(processes, device) if all(one.fine for one in found) else []
    found += [*_shares(config, processes), *_start(config, made_before)]
    if isinstance(config, TrainConfig):
        vision = config.repa.vision if config.repa.weight and not _holds_vision(config.data.folders) else ""
        found += [*_data(config), *_encoders(config.data.encoders, vision), *_memory(config, processes, device)]
    if isinstance(config, StudentConfig):
        found += [_weights("teacher", config.teacher), *_drawn(config), *_encoders(config.data.encoders)]
    if isinstance(config, RewardConfig):
        found += [*_prompts(config), *_rewards(config), *_encoders(_encoders_of(config.start_from))]
    return [*found, *_disk(config, Path(run_dir))]


def require(findings: Sequence[Finding]) -> None:
    """Prints the findings.

    Raises:
        RuntimeError: one is missing that the run cannot do without.
    """
    for one in findings:
        print(f"{'ok     ' if one.fine else 'MISSING' if one.must else 'look   '} {one.name:26} {one.says}")
    if missing := [one for one in findings if one.must and not one.fine]:
        raise Unusable("the run cannot start: " + "; ".join(f"{one.name}: {one.says}" for one in missing))


def _accelerators(device: str | None) -> int:
    chosen = pick_device(device)
    return 0 if chosen.type == "cpu" else torch.accelerator.device_count()


def _devices(config: RunConfig, processes: int, device: str | None) -> Iterator[Finding]:
    """Eight processes on a CPU are not eight GPUs: the full size needs one accelerator for each process."""
    there, full = _accelerators(device), getattr(config, "preset", "") == "full"
    one = device_name(pick_device(device))
    if there:
        yield Finding("accelerators", there >= processes, f"{there} x {one} for {processes} processes")
        backend = attention_backend(pick_device(device))
        says = backend if backend != "MATH" else "MATH: slow, much memory; this build has no kernels for this GPU"
        yield Finding("attention", backend != "MATH", says)
    else:
        how = f"{processes} process{'es' * (processes > 1)} on the CPU"
        says = f"none here; {how} would take years with the full model" if full else f"none here, none needed: {how}"
        yield Finding("accelerators", not full, says)
    for name in ("WORLD_SIZE", "SLURM_STEP_ID"):
        if processes > 1 and name in os.environ:
            says = f"{name}={os.environ[name]}: this runs inside of torchrun or srun, each would start {processes} more"
            yield Finding("launcher", False, says)


def _shares(config: RunConfig, processes: int) -> Iterator[Finding]:
    """A batch is divided among the processes and the parts of a step."""
    if config.batch_size % (processes * config.accumulate):
        says = f"{config.batch_size:,} cannot be divided by {processes} processes times accumulate={config.accumulate}"
        yield Finding("batch", False, says)


def _exchange(processes: int, device: str | None) -> Iterator[Finding]:
    if processes == 1 or processes > (_accelerators(device) or processes):
        return
    lines: list[str] = []
    try:
        words, environment = ["-m", handshake.__name__], launch.child_environment(processes, device)
        launch.run_processes(words, processes, environment, lines.append, restarts=0)
        (said,) = (line.removeprefix(handshake.SAYS) for line in lines if line.startswith(handshake.SAYS))
        found = json.loads(said)
    except (launch.LaunchError, ValueError) as error:
        waited = [line.removeprefix("handshake ") for line in lines if line.startswith(handshake.GIVES_UP)]
        yield Finding("exchange of gradients", False, "; ".join(waited) or f"failed: {str(error).splitlines()[-1]}")
        return
    says = f"{found['backend']}: {found['world']} met in {found['met']:.1f} s; {found['sent'] / 1e9:.2f} GB/s each"
    yield Finding("exchange of gradients", found["right"] and found["world"] == processes, says)


def _start(config: RunConfig, made_before: bool) -> Iterator[Finding]:
    source = getattr(config, "start_from", "")
    if made_before:
        yield Finding("weights to start from", True, "made by the stage before")
    elif source or getattr(config, "stage", "") == "finetune":
        yield _weights("weights to start from", source)


def _weights(name: str, source: str) -> Finding:
    if Path(source).is_file():  # an official .safetensors file
        return Finding(name, True, source)
    if source == OFFICIAL and not Path(source).is_dir():
        return _on_the_hub(source, HUB_REVISIONS[source], name, "Nitro-E-512px.safetensors")
    files = ("model_index.json", "diffusion_pytorch_model*", "transformer/diffusion_pytorch_model*", ADAPTER)
    return _folder(name, source, *files)


def _data(config: TrainConfig) -> Iterator[Finding]:
    data = config.data
    if not data.folders:
        yield Finding("data", True, f"{data.scenes:,} synthetic scenes, encoded on first use")
        return
    rows = 0
    for folder in map(Path, data.folders):
        try:
            card = read_card(folder)
            columns = array_shapes(card)
        except (FileNotFoundError, KeyError, ValueError):
            says = "no shards (card.json is missing or broken); nitro-e data encode makes them"
            yield Finding(f"data: {folder}", False, says)
            continue
        there = sum(state["rows"] for state in sidecars(folder).values() if state)
        rows += there
        lacks = "; text is encoded in training" * ("text" not in columns)
        unseen, pictures = config.repa.weight > 0 and "vision" not in columns, card.get("pictures") is not None
        if unseen:
            nothing = "; no vision features and no pictures (--vision, --pictures)"
            lacks += "; vision features are computed from pictures" if pictures else nothing
        fine = there > 0 and (pictures or not unseen)
        yield Finding(f"data: {folder}", fine, f"{there:,} rows of {', '.join(columns)}{lacks}")
    enough = rows >= config.batch_size
    yield Finding("rows in all", enough, f"{rows:,}; a batch has {config.batch_size:,}")
    if not data.validation_folders:
        yield Finding("validation data", False, "none named in data.validation_folders")
    for folder in map(Path, data.validation_folders):
        there = sum(state["rows"] for state in sidecars(folder).values() if state)
        yield Finding(f"validation data: {folder}", there > 0, f"{there:,} rows" if there else "no shards there")


def _drawn(config: StudentConfig) -> Iterator[Finding]:
    """A lesson draws the pictures of small students itself; those of the full one take days."""
    if config.preset != "full":
        yield Finding(
            "drawn pictures", True, "a lesson draws those that are missing; for a command nitro-e data draw makes them"
        )
        return
    needed = config.batch_size + config.data.validation_rows
    for folder in map(Path, config.data.folders):
        there = sum(state["rows"] for state in sidecars(folder).values() if state)
        says = f"{there:,} pictures; a batch and validation take {needed:,}; nitro-e data draw makes them"
        yield Finding(f"drawn: {folder}", there >= needed, says)


def _prompts(config: RewardConfig) -> Iterator[Finding]:
    if not config.prompts:
        return
    if not Path(config.prompts).is_file():
        yield Finding("prompts", False, f"no file {config.prompts}; JSON lines in GenEval's schema")
        return
    try:
        entries = read_metadata(config.prompts)
    except UserError as error:
        yield Finding("prompts", False, str(error))
    else:
        yield Finding("prompts", True, f"{config.prompts}: {len(entries):,} of them")


def _rewards(config: RewardConfig) -> Iterator[Finding]:
    """Every judge is there and tells a good picture from a bad one; one attempt, since a server should be up by now."""
    pictures = config.steps * config.batch_size

    def ask(name: str) -> Finding:
        try:
            opened, begin = rewards.open_rewards([name], config.reward_timeout, retries=0), time.perf_counter()
            ((good, bad),) = rewards.preflight(opened).values()
            hours = (time.perf_counter() - begin) / 2 * pictures / len(name.split(",")) / 3600
            shown = ("its good picture", "its bad one")
            if not getattr(opened[0], "examples", None):
                shown = ("a red circle, as asked for,", "a blue square in its place")
            says = f"{shown[0]} {good:.2f}; {shown[1]} {bad:.2f}; "
            says += f"at this pace {hours:,.1f} hours for the run's {pictures:,} pictures"
            return Finding(f"reward: {name}", True, says)
        except UserError as error:
            return Finding(f"reward: {name}", False, str(error))

    names = [*(name for name, _ in config.rewards), *config.watch]
    yield from _together(ask, dict.fromkeys(names))


def _holds_vision(folders: Sequence[str]) -> bool:
    """Whether all data that is here has vision features: then nobody looks at pictures."""
    try:
        cards = [read_card(Path(folder)) for folder in folders if sidecars(Path(folder))]
    except UserError:  # `_data` names it
        return False
    return bool(cards) and len(cards) == len(folders) and all("vision" in array_shapes(card) for card in cards)


def _encoders(source: str, vision: str = "") -> Iterator[Finding]:
    """Those of pictures and captions, and a vision model; nothing to look for where one is empty."""
    wanted = []
    if source == "full":
        wanted = [(FULL_AUTOENCODER, HUB_REVISIONS), (FULL_TEXT_ENCODER, HUB_REVISIONS)]
    elif source:
        yield _folder("encoders", source, "vae/latent_stats.json")
    if vision in VISION_REVISIONS:
        wanted.append((vision, VISION_REVISIONS))
    elif vision:
        yield _folder("vision model", vision, *VISION_FILES)
    yield from _together(lambda one: _on_the_hub(one[0], one[1][one[0]]), wanted)


def _encoders_of(model: str) -> str:
    """The encoders that `model` is drawn with and does not hold itself: a pipeline does, an official file never."""
    if model == OFFICIAL or Path(model).is_file():
        return "full"
    for file in (Path(model) / "config.json", Path(model).parent / "config.json"):  # of a run, or of its `final`
        if isinstance(run := read_json(file).get("config") if file.is_file() else None, dict):
            return run.get("data", {}).get("encoders", "")
    return ""


def _together(look: Callable[[Any], Finding], at: Iterable[Any]) -> list[Finding]:
    """What is found at several places that may take their time to answer."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(look, at))


def _folder(name: str, source: str, *files: str) -> Finding:
    try:
        find_weights(source, *files)
        return Finding(name, True, source)
    except UserError as error:
        return Finding(name, False, str(error))


def _on_the_hub(name: str, revision: str, what: str = "encoder", file: str = "config.json") -> Finding:
    """Whether the pinned files, `file` one of them, lie in the cache, or else whether the hub would hand them out."""
    found = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(found, str) and [*Path(found).parent.rglob("*.safetensors")]:
        return Finding(f"{what}: {name}", True, "in the cache of the hub")
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=10)
        return Finding(f"{what}: {name}", True, "the hub hands it out; hf download fetches it beforehand")
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = f"accept its licence at https://huggingface.co/{name}, hf auth login, hf download {name}"
        return Finding(f"{what}: {name}", False, f"not here, and not to be had ({reason}); {advice}")


def _memory(config: TrainConfig, processes: int, device: str | None) -> Iterator[Finding]:
    chosen = pick_device(device)
    if chosen.type != "cuda" or config.batch_size % (processes * config.accumulate):
        return
    there = torch.cuda.get_device_properties(chosen).total_memory
    known = [one.name for one in HARDWARE.values() if one.label and one.label in device_name(chosen)]
    needed = plan(config, (known or ["h100"])[0], processes, pictures=1).needed
    says = f"{needed / 1e9:.0f} GB planned of {there / 1e9:.0f}; where it does not fit, raise accumulate"
    yield Finding("memory of one", needed < ROOM * there, says)


def _disk(config: RunConfig, run_dir: Path) -> Iterator[Finding]:
    """Room for checkpoints, one more than are kept, since the new one stands before an old one goes; and snapshots."""
    there = run_dir.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if isinstance(config, StudentConfig):  # as large as a model of stage 2; its heads are a hundredth of that
        same = {"ema_decay": config.ema_decay, "optimizer": config.optimizer}
        model = dataclasses.replace(preset("finetune", config.preset), **same)
    elif isinstance(config, TrainConfig):
        model = config
    else:  # adapters and encoders, which are small
        yield Finding("disk", free > SCRATCH, f"{free / 1e9:,.0f} GB free for checkpoints")
        return
    kept, snapshots = config.keep_checkpoints + 1, config.steps // config.snapshot_every if config.snapshot_every else 0
    wanted = kept * checkpoint_bytes(model) + snapshots * snapshot_bytes(model)
    wanted += SCRATCH if config.preset == "full" else 0
    says = f"{free / 1e9:,.0f} GB free, {wanted / 1e9:,.1f} for {kept} checkpoints"
    says += f" and {snapshots} snapshots" * (snapshots > 0)
    yield Finding("disk", free > wanted, says)
    if not isinstance(config, TrainConfig):
        return
    missing = [folder for folder in config.data.folders if not sidecars(Path(folder))]
    if count := sum(PICTURES.get(Path(folder).name, 0) for folder in missing):
        more = {name: count * encoder.stored for name, encoder in frozen_encoders(config).items()}
        size = ", ".join(f"{name} {bytes_ / 1e12:.2f}" for name, bytes_ in more.items())
        says = f"{free / 1e12:.2f} TB free; {', '.join(missing)} will take {size} TB, as far as they are stored"
        yield Finding("disk for data", free > sum(more.values()), says, must=False)
