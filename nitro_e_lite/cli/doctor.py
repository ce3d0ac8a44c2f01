"""What is installed here, what is missing, and what to do about it.

The doctor compares the installed packages with the pins of this package's own metadata, so it cannot disagree
with `pyproject.toml`. It must be able to speak when an installation is broken, therefore nothing heavy is
imported before the packages have been looked at.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

DISTRIBUTION = "nitro-e-lite"
AMD_DRIVER = Path("/dev/kfd")  # there where Linux knows an AMD GPU to compute on


def check_packages() -> list[dict[str, Any]]:
    """One row a requirement: `name`, `wanted`, `found`, `extra` (None for the core), `ok`."""
    rows = []
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        extra = str(requirement.marker).split("==")[-1].strip(" \"'") if requirement.marker else None
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        rows.append(
            {
                "name": requirement.name,
                "wanted": str(requirement.specifier),
                "found": found,
                "extra": extra,
                "ok": found is not None and requirement.specifier.contains(found, prereleases=True),
            }
        )
    return rows


def diagnose() -> dict[str, Any]:
    """The whole report as plain JSON.

    Returns:
        `ok` (everything the core needs is there), `problems` (sentences that say what to do), `packages`,
        `environment`, `weights` and `fp8` (the rung of the ladder this machine can do, and why no higher one); these
        three are None when a core package is missing.
    """
    packages = check_packages()
    broken = [row for row in packages if not row["ok"] and row["extra"] is None]
    problems = [f"{row['name']} {row['wanted']}: found {row['found'] or 'nothing'}" for row in broken]
    if problems:
        advice = 'install the package again in a fresh environment: pip install -e "."'
        return {
            "ok": False,
            "problems": [*problems, advice],
            "packages": packages,
            "environment": None,
            "weights": None,
            "fp8": None,
        }
    import torch

    from nitro_e_lite import files, runtime
    from nitro_e_lite.model.fp8_ladder import choose_rung

    weights: dict[str, int] = {}
    folders = sorted(p.parent for p in files.weights_dir().glob(f"*/{files.MANIFEST}"))
    if not folders:
        problems.append(
            f"{files.weights_dir()}: no shipped weights; get the checkout again, or train with nitro-e train"
        )
    for folder in folders:
        try:
            names = files.check_manifest(folder)
            weights[folder.name] = sum((folder / name).stat().st_size for name in names)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if AMD_DRIVER.exists() and not torch.version.hip:
        problems.append(
            "an AMD GPU is here, and this torch is not built for ROCm; notebooks/FULL_RUN.md has the command for one "
            "that is"
        )
    choice = choose_rung(runtime.pick_device())
    fp8 = {"rung": choice.rung, "reasons": list(choice.reasons)}
    report = {"packages": packages, "environment": runtime.environment_report(), "weights": weights, "fp8": fp8}
    return {"ok": not problems, "problems": problems} | report
