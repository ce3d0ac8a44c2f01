"""The two lists of pins say the same, and say what they must."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ALL = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def conda_pip_lines() -> list[str]:
    return next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))


def test_environment_yml_holds_the_pins_of_pyproject():
    lines = conda_pip_lines()
    assert lines[-1] == "-e ."
    assert sorted(lines[:-1]) == sorted(set(ALL))


def test_conda_python_is_one_that_the_package_accepts():
    python = next(e for e in CONDA["dependencies"] if isinstance(e, str) and e.startswith("python="))
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(python.partition("=")[2])


def test_torch_stays_within_one_minor_release():
    assert "torch~=2.13.0" in PROJECT["dependencies"]


@pytest.mark.parametrize(
    "name",
    "jupyterlab torch accelerate transformers diffusers safetensors matplotlib nbval papermill ipywidgets".split(),
)
def test_package_of_the_course_is_required(name):
    assert name in {Requirement(line).name for line in ALL}


@pytest.mark.parametrize("name", ["torchvision", "timm", "mosaicml-streaming", "streaming"])
def test_package_that_breaks_the_installation_stays_out(name):
    assert name not in {Requirement(line).name for line in ALL}
