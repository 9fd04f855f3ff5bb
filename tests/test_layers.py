"""Rules for the source: imports only from lower layers, never from siblings."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flexgen"

# Lowest first. A module imports from lower layers and from its own room (a folder is one room), never from
# a sibling on its own layer.
LAYERS = [
    {"errors"},
    {"units"},
    {"policy", "workload", "schedule", "demo"},
    {"results"},
    {"kernels"},
    {"models", "quant"},
    {"layout"},
    {"memory"},
    {"runtime", "predict"},
    {"search", "probe"},
    {"engine"},
    {"cli"},
    {"hf", "flex_opt", "tuning"},
    {"bench", "tune", "simulate", "measure", "complete", "batch"},
    {"__init__", "__main__"},
]
WITHOUT_TORCH = {"errors", "units", "policy", "workload", "schedule", "demo", "results"}
FLAGS = {
    Path("cli", name)
    for name in ("flags.py", "answers.py", "help.py", "interrupts.py", "job_file.py", "prompts.py")
}
MAX_LINES = 400
OLD_NAMES = Path("flex_opt/old_names")

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in FILES}
each_file = pytest.mark.parametrize("path", SOURCES, ids=str)


def room(path):
    """The first folder below flexgen, or the file's own name."""
    return Path(path.parts[0]).stem


def layer(name):
    found = [number for number, rooms in enumerate(LAYERS) if name in rooms]
    assert found, f"{name} has no layer yet: add it to LAYERS"
    return found[0]


def imported(tree):
    """Full names of all imports below `tree`: (line, "flexgen.memory.disk.DiskIO")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import with its full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own(tree):
    return [(line, name) for line, name in imported(tree) if name.split(".")[0] == "flexgen"]


@each_file
def test_imports_point_down(path):
    for line, name in own(ast.parse(SOURCES[path])):
        target = name.split(".")[1] if "." in name else "__init__"
        allowed = target == room(path) or layer(target) < layer(room(path))
        assert allowed, f"{path}:{line}: {room(path)} must not import {name}"


@each_file
def test_imports_of_flexgen_stand_at_the_top(path):
    for node in ast.walk(ast.parse(SOURCES[path])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert not own(node), f"{path}: {node.name} imports {own(node)} inside its body"


# Where modules of flexgen are imported by a name that is not in the source: parts of the package that load when they
# are asked for, commands, families of models, codecs, Triton's kernels and 0.1's module names.
BY_NAME = {
    "__init__.py",
    "__main__.py",
    "models/families/__init__.py",
    "quant/codecs/__init__.py",
    "kernels/loading.py",
    "flex_opt/flexllmgen/__init__.py",
}


@each_file
def test_few_files_import_flexgen_by_a_computed_name(path):
    for node in ast.walk(ast.parse(SOURCES[path])):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            name = node.args[0]
            foreign = isinstance(name, ast.Constant) and name.value.split(".")[0] != "flexgen"
            assert foreign or path.as_posix() in BY_NAME, f"{path}:{node.lineno}: import it at the top"


@each_file
def test_low_layers_do_without_torch(path):
    if room(path) in WITHOUT_TORCH or path in FLAGS:
        heavy = [name for _, name in imported(ast.parse(SOURCES[path])) if name.split(".")[0] == "torch"]
        assert not heavy, f"{path} imports {heavy}"


@each_file
def test_files_are_short_and_well_named(path):
    if OLD_NAMES in path.parents:  # the modules of FlexGen 0.1, for its scripts: imports and no code
        docstring, *rest = ast.parse(SOURCES[path]).body
        assert isinstance(docstring, ast.Expr)
        for node in rest:
            named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert named or isinstance(node, ast.ImportFrom), f"{path}:{node.lineno}: write it elsewhere"
    else:
        assert path.name not in ("utils.py", "util.py", "helpers.py", "misc.py")
    lines = SOURCES[path].count("\n")
    assert lines <= MAX_LINES, f"{path} has {lines} lines, at most {MAX_LINES}: split it"


def test_the_documentation_shows_the_layers():
    """docs/architecture.md, highest first."""
    lines = [", ".join(sorted(rooms)) for rooms in reversed(LAYERS[:-1])]
    table = "\n".join(["```", *lines, "```"])
    shown = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert table in shown, f"write this into docs/architecture.md:\n{table}"


def test_the_root_has_only_commands_and_modules_without_torch():
    assert len(list(PACKAGE.glob("*.py"))) <= 12, "put it into a room"


def test_every_folder_is_a_package():
    folders = {path.parent for path in SOURCES}
    missing = [str(folder) for folder in folders if folder / "__init__.py" not in SOURCES]
    assert not missing, f"no __init__.py in {missing}: an installed flexgen would lack them"


def test_no_circular_imports():
    modules = {
        ".".join(("flexgen", *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in SOURCES
    }
    graph = {}
    for module, path in modules.items():
        # `from flexgen.memory import disk` names a module, `from flexgen.policy import Policy` a part of one.
        names = [name for _, name in own(ast.parse(SOURCES[path]))]
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle
