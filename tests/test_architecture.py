"""The shape of the project: rooms and their order, safe loading, declared imports, a README that tells the truth.

Everything here is read as text, so that it also runs where nothing but pytest is installed.
"""

import ast
import graphlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nitro_e_lite"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
MODULES = {name: path for name, path in FILES.items() if path.stem != "__init__"}
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A module imports only from rooms above its own; inside a room there is no circle. Root modules come first.
ROOMS = ["", *"scenes model inference data evaluation training stages course experiments cli".split()]
IMPORT_NAMES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "huggingface-hub": "huggingface_hub",
    "jupyter-server": "jupyter_server",
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a module imports, wherever in the file; a module named in a string counts too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}, line {node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {name for name in re.findall(r"^nitro_e_lite(?:\.\w+)+$", node.value)}
    return found


def room(name: str) -> str:
    return name.rpartition(".")[0]


def used_modules(name: str) -> set[str]:
    """The project's own modules that a module imports."""
    used = {
        dotted.removeprefix("nitro_e_lite.") for dotted in imports(FILES[name]) if dotted.startswith("nitro_e_lite.")
    }
    return {other for other in MODULES if any(one == other or one.startswith(f"{other}.") for one in used)} - {name}


def test_rooms_and_what_is_in_them():
    """Sizes are printed, never failed: no limit decides against a fix."""
    assert {room(name) for name in MODULES} == set(ROOMS)
    for one in ROOMS:
        inside = {name: path for name, path in MODULES.items() if room(name) == one}
        sizes = {
            name.rpartition(".")[2]: len(path.read_text(encoding="utf-8").splitlines()) for name, path in inside.items()
        }
        largest = max(sizes, key=sizes.get)
        print(
            f"{one or 'root':12} {len(sizes):2} modules, largest {largest} ({sizes[largest]} lines): {', '.join(sizes)}"
        )


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_from_rooms_above_its_own(name):
    above = ROOMS[: ROOMS.index(room(name)) + 1]
    assert sorted(other for other in used_modules(name) if room(other) not in above) == []


@pytest.mark.parametrize("one", ROOMS)
def test_a_room_has_no_circle(one):
    graph = {
        name: {other for other in used_modules(name) if room(other) == one} for name in MODULES if room(name) == one
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def test_folders_hold_a_docstring_and_nothing_else():
    for name, path in FILES.items():
        if path.stem == "__init__" and name != "__init__":
            assert ast.get_docstring(tree(path)) and len(tree(path).body) == 1, name


def test_wheel_holds_every_room():
    from setuptools import find_packages

    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"][
        "find"
    ]
    packages = set(find_packages(str(ROOT), include=found["include"]))
    assert packages == {"nitro_e_lite", *(f"nitro_e_lite.{one}" for one in ROOMS if one)}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_and_public_names_have_docstrings(name):
    module = tree(MODULES[name])
    assert ast.get_docstring(module)
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_imports_are_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {Requirement(line).name for line in project["dependencies"]}
    known = {IMPORT_NAMES.get(name, name) for name in declared} | set(sys.stdlib_module_names) | {"nitro_e_lite"}
    used = {name: {dotted.split(".")[0] for dotted in imports(path)} for name, path in MODULES.items()}
    elsewhere = used.pop("evaluation.judge_server")  # a script for the environments of other tools
    assert "nitro_e_lite" not in elsewhere and elsewhere - known == {"hpsv2"}
    assert set().union(*used.values()) <= known


UNSAFE = {
    "pickle": r"\bpickle\b(?!s)",
    "unsafe torch.load": r"weights_only\s*=\s*False",
    "remote code": r"trust_remote_code\s*=\s*True",
    "device by method": r"\.cuda\(\)",
    "torchvision": r"\bimport torchvision|from torchvision",
    "timm": r"\bimport timm|from timm",
    "streaming": r"\bimport streaming|from streaming",
}


@pytest.mark.parametrize("what", sorted(UNSAFE))
def test_package_does_without(what):
    for name, path in MODULES.items():
        assert not re.search(UNSAFE[what], path.read_text(encoding="utf-8")), f"{name}.py: {what}"


def test_torch_load_reads_weights_only():
    for name, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", f"{name}.py, line {node.lineno}"


def test_no_file_names_a_machine():
    paths = [*MODULES.values(), ROOT / "README.md", *(ROOT / "figures").glob("*.json")]
    paths += [*PACKAGE.rglob("*.json"), *PACKAGE.rglob("*.md"), *(ROOT / "data_cards").glob("*.md")]
    pattern = re.compile(r"(?<![\w.])/(?:" + "|".join(["work", "root", "home", "tmp", "opt"]) + r")/\w")
    assert [path.name for path in paths if pattern.search(path.read_text(encoding="utf-8"))] == []


# README


def test_readme_is_short():
    assert len(README.splitlines()) <= 240


def test_readme_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", README)
    local = [a or b for a, b in targets if not (a or b).startswith("http")]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_readme_package_map_names_every_room_and_module():
    rows = dict(re.findall(r"^\| `(\w+)/?` \| (.+) \|$", README, flags=re.MULTILINE))
    for one in ROOMS:
        named = set(re.findall(r"`(\w+)`", rows["nitro_e_lite" if not one else one]))
        inside = {name.rpartition(".")[2] for name in MODULES if room(name) == one} - {"__main__"}
        assert named == inside, one or "root"


def test_ci_runs_the_readmes_test_command():
    command = 'pip install -e ".[test]" && pytest'
    assert command in README and command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_tests_of_structure_need_no_package_but_pytest_yaml_and_packaging():
    """They once stopped at "No module named 'matplotlib'": documents and imports can be read without torch."""
    allowed = {*sys.stdlib_module_names, "pytest", "yaml", "packaging"}
    for name in ("conftest", "test_architecture", "test_environment", "test_notebooks"):
        body = ast.parse((ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")).body
        plain = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        plain |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
        assert {module.partition(".")[0] for module in plain} <= allowed, name
