"""The shape of the project: layers, sizes, safe loading, declared imports, and a README that tells the truth."""

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement

from nitro_e_lite.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nitro_e_lite"
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A module imports only from lines above its own.
LAYERS = [
    "common config fused hardware uncertainty",
    "products training_state",
    "attention encoders fitting flow geneval_files inputs order scenes segments shards sources terminal tokens viz",
    "autoencoder_training blocks data_check encoder_set grounding minimal_pairs repa verifier",
    "emmdit encode_data geneval language_model_training quality training_data vision_training",
    "batches checkpoint optimizers pipeline",
    "benchmark doctor evaluate loading sensitivity",
    "progress shipping",
    "planner train",
    "comparison launch rehearsal",
    "cli_data cli_measure lessons notebooks",
    "reproduce",
    "cli_train",
    "cli",
]
LAYER = {name: depth for depth, line in enumerate(LAYERS) for name in line.split()}
MAX_MODULE, MAX_FUNCTION = 300, 40  # lines of code: no blank lines, comments or docstrings
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}
IMPORT_NAMES |= {"huggingface-hub": "huggingface_hub", "jupyter-server": "jupyter_server"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "nitro_e_lite" + (f".{node.module}" if node.module else "") if node.level else node.module
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that hold code."""
    lines = path.read_text(encoding="utf-8").splitlines()
    code = {number for number, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return code


def test_every_module_has_a_layer():
    assert set(LAYER) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_from_lower_layers(name):
    used = {dotted.split(".")[1] for dotted in imports(MODULES[name]) if dotted.startswith("nitro_e_lite.")}
    used = {("loading" if other == "load_pipeline" else other) for other in used}  # the package's one public name
    assert [other for other in sorted(used & set(MODULES)) if LAYER[other] >= LAYER[name]] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_and_its_functions_are_short_enough_to_read(name):
    code = code_lines(MODULES[name])
    assert len(code) <= MAX_MODULE
    for node in ast.walk(tree(MODULES[name])):
        if isinstance(node, ast.FunctionDef):
            body = [line for line in code if node.body[0].lineno <= line <= node.end_lineno]
            assert len(body) <= MAX_FUNCTION, f"{node.name}: {len(body)} lines"


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
    used = {dotted.split(".")[0] for path in MODULES.values() for dotted in imports(path)}
    assert used <= known


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
    paths = [*MODULES.values(), ROOT / "README.md", *PACKAGE.rglob("*.json"), *(ROOT / "figures").glob("*.json")]
    pattern = re.compile(r"(?<![\w.])/(?:" + "|".join(["work", "root", "home", "tmp"]) + r")/\w")
    assert [path.name for path in paths if pattern.search(path.read_text(encoding="utf-8"))] == []


# README


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("nitro-e ")]


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("line", readme_commands())
def test_readme_command_exists(line):
    found, words = typer.main.get_command(app), shlex.split(line)[1:]
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    assert not hasattr(found, "commands"), f"{line!r} names no command"
    options = {option for parameter in found.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


def test_readme_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", README)
    local = [a or b for a, b in targets if not (a or b).startswith("http")]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_readme_package_map_is_complete():
    named = set(re.findall(r"`(\w+)\.py`", README))
    assert named >= set(MODULES)
    assert named <= set(MODULES)


def test_ci_runs_the_readmes_test_command():
    command = 'pip install -e ".[test]" && pytest'
    assert command in README and command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
