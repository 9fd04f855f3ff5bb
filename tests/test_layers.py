"""Rules for the source: imports only from lower layers, never from siblings."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from flexgen.__main__ import COMMANDS, module_of

PACKAGE = Path(__file__).parents[1] / "flexgen"

# flex_opt is also an adapter, in the layer of adapters.
OWN_COMMANDS = set(map(module_of, COMMANDS)) - {"flex_opt"}

# Lowest first. A module imports from lower layers and from its own room (a folder is one room), never from
# a sibling on its own layer.
LAYERS = [
    {"errors"},
    {"units", "user_cache"},
    {"policy", "workload", "schedule", "demo"},
    {"results"},
    {"kernels"},
    {"formats"},
    {"models", "quant"},
    {"layout"},
    {"memory"},
    {"runtime", "predict"},
    {"search", "probe"},
    {"engine"},
    {"cli"},
    {"hf", "flex_opt", "tuning"},
    OWN_COMMANDS,
    {"__init__", "__main__"},
]
WITHOUT_TORCH = {
    "errors",
    "units",
    "user_cache",
    "policy",
    "workload",
    "schedule",
    "demo",
    "results",
}
FLAGS = {
    Path("cli", name)
    for name in ("flags.py", "answers.py", "help.py", "interrupts.py", "job_file.py", "prompts.py")
}
MAX_LINES = 400
MOST_IN_ROOT = 12
OLD_NAMES = Path("flex_opt/old_names")

SOURCES = {
    path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}


def room(path):
    """The first folder below flexgen, or the file's own name."""
    return Path(path.parts[0]).stem


def layer(name):
    found = [number for number, rooms in enumerate(LAYERS) if name in rooms]
    assert found, f"{name} has no layer yet: add it to LAYERS"
    return found[0]


def imports(path, node):
    """The imports anywhere below `node`: ("memory/disk.py:12", "flexgen.memory.threads.start")."""
    for below in ast.walk(node):
        if isinstance(below, ast.Import):
            yield from ((f"{path}:{below.lineno}", alias.name) for alias in below.names)
        elif isinstance(below, ast.ImportFrom):
            # "." marks a relative import, which names no layer.
            module = "." * below.level + (below.module or "")
            yield from ((f"{path}:{below.lineno}", f"{module}.{alias.name}") for alias in below.names)


IMPORTS = {path: list(imports(path, tree)) for path, tree in TREES.items()}


def top(name):
    return name.split(".")[0]


def flexgen_imports(path):
    return [(where, name) for where, name in IMPORTS[path] if top(name) == "flexgen"]


def test_imports_give_full_names():
    wrong = [where for path in TREES for where, name in IMPORTS[path] if name.startswith(".")]
    assert wrong == [], "write these imports with their full names"


def test_every_module_has_a_layer():
    missing = {room(path) for path in TREES} - set().union(*LAYERS)
    assert not missing, "add these to LAYERS"


def test_imports_point_down():
    wrong = [
        f"{where}: {room(path)} must not import {name}"
        for path in TREES
        for where, name in flexgen_imports(path)
        for target in [name.split(".")[1] if "." in name else "__init__"]
        if target != room(path) and layer(target) >= layer(room(path))
    ]
    assert wrong == []


def test_imports_of_flexgen_stand_at_the_top():
    wrong = [
        f"{where}: {node.name} imports {name} inside its body"
        for path, tree in TREES.items()
        if flexgen_imports(path)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for where, name in imports(path, node)
        if top(name) == "flexgen"
    ]
    assert wrong == []


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


def imports_by_name(tree):
    """Calls of import_module and __import__ whose module is not a constant outside flexgen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            name = node.args[0]
            if not isinstance(name, ast.Constant) or top(name.value) == "flexgen":
                yield node


def test_few_files_import_flexgen_by_a_computed_name():
    wrong = [
        f"{path}:{call.lineno}: import it at the top"
        for path, tree in TREES.items()
        if path.as_posix() not in BY_NAME and "import" in SOURCES[path]
        for call in imports_by_name(tree)
    ]
    assert wrong == []


def test_low_layers_do_without_torch():
    wrong = [
        f"{where}: imports {name}"
        for path in TREES
        if room(path) in WITHOUT_TORCH or path in FLAGS
        for where, name in IMPORTS[path]
        if top(name) == "torch"
    ]
    assert wrong == []


def test_old_names_hold_no_code():
    """The modules of FlexGen 0.1, for its scripts: imports only."""
    for path, tree in TREES.items():
        if OLD_NAMES in path.parents:
            docstring, *rest = tree.body
            assert isinstance(docstring, ast.Expr), f"{path} has no docstring"
            for node in rest:
                named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                assert named or isinstance(node, ast.ImportFrom), f"{path}:{node.lineno}: write it elsewhere"


def test_files_are_well_named():
    vague = {"utils.py", "util.py", "helpers.py", "misc.py"}
    wrong = [str(path) for path in TREES if path.name in vague and OLD_NAMES not in path.parents]
    assert wrong == []


def test_files_are_short():
    lines = {str(path): source.count("\n") for path, source in SOURCES.items()}
    long = {path: count for path, count in lines.items() if count > MAX_LINES}
    assert not long, f"at most {MAX_LINES} lines: split these"


def test_the_documentation_shows_the_layers():
    """docs/architecture.md, highest first."""
    rooms_of_layers = [{"the commands"} if rooms is OWN_COMMANDS else rooms for rooms in LAYERS[:-1]]
    lines = [", ".join(sorted(rooms)) for rooms in reversed(rooms_of_layers)]
    table = "\n".join(["```", *lines, "```"])
    shown = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert table in shown, f"write this into docs/architecture.md:\n{table}"


def test_the_root_has_only_commands_and_modules_without_torch():
    others = (
        {path.stem for path in PACKAGE.glob("*.py")}
        - set(map(module_of, COMMANDS))
        - {"__init__", "__main__"}
    )
    assert others == {"errors", "units", "user_cache", "workload"}, (
        "add a command to COMMANDS in flexgen/__main__.py; put any other module into a folder"
    )
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_IN_ROOT


def test_every_folder_is_a_package():
    folders = {path.parent for path in TREES}
    missing = [str(folder) for folder in folders if folder / "__init__.py" not in TREES]
    assert not missing, f"no __init__.py in {missing}: an installed flexgen would lack them"


def test_no_circular_imports():
    modules = {
        ".".join(("flexgen", *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in TREES
    }
    graph = {
        # `from flexgen.memory import disk` names a module, `from flexgen.policy import Policy` a part of one.
        module: {name if name in modules else name.rpartition(".")[0] for _, name in flexgen_imports(path)}
        for module, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle
