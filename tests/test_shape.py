"""The shape of functions and classes: few parameters, few attributes, and a reason for each exception."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "flexgen"
MOST_PARAMETERS = 6  # without self and cls
MOST_ATTRIBUTES = 12

PAPER = "the interface of FlexGen 0.1"
TRANSFORMERS = "the interface of transformers"
TRITON = "Triton compiles it: a kernel takes pointers and sizes, no objects"

PARAMETERS = {
    "engine/model.py OptLM.__init__": "the public keywords of opening a model, each with a default",
    "engine/model.py OptLM.generate": f"{PAPER}, and keywords for sampling, each with a default",
    "engine/model.py OptLM.sampled": "the keywords for sampling of `generate`, which the user gives",
    "flex_opt/benchmark.py write_benchmark_log": PAPER,
    "flex_opt/model.py OptLM.generate": PAPER,
    "hf/model.py FlexGenForCausalLM.from_pretrained": TRANSFORMERS,
    "hf/model.py FlexGenForCausalLM.forward": TRANSFORMERS,
    "kernels/triton_groupwise.py _decode": TRITON,
    "kernels/triton_groupwise.py _add_product": TRITON,
    "kernels/triton_groupwise.py multiply_tile": TRITON,
    "kernels/triton_groupwise.py store_tile": TRITON,
    "kernels/triton_groupwise.py _multiply": TRITON,
    "kernels/triton_grouped.py _multiply_groups": TRITON,
}
ATTRIBUTES = {
    "flex_opt/config.py OptConfig": PAPER,
    "flex_opt/policy.py Policy": PAPER,
    "models/spec.py ModelSpec": "an attribute for each property of a checkpoint that the layers do not have",
    "policy/policy.py Policy": "a field for each key of a policy file",
    "predict/hardware.py Hardware": "a field for each key of a hardware file",
    "results/report.py Report": "a field for each key of a report's JSON",
}


def parameters(function):
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return sum(each.arg not in ("self", "cls") for each in named)


def attributes(cls):
    """The fields of a dataclass, and what methods assign to self."""
    fields = {
        node.target.id
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    }
    assigned = {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return len(fields | assigned)


def too_large(source, where):
    """The functions and the classes of a module that are over the limits, as "file Class.function"."""
    functions, classes = {}, {}

    def look(node, names):
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = [*names, child.name]
                name = f"{where} {'.'.join(inner)}"
                if isinstance(child, ast.ClassDef):
                    if (count := attributes(child)) > MOST_ATTRIBUTES:
                        classes[name] = count
                elif (count := parameters(child)) > MOST_PARAMETERS:
                    functions[name] = count
            look(child, inner)

    look(ast.parse(source), [])
    return functions, classes


def all_too_large():
    functions, classes = {}, {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found = too_large(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())
        functions |= found[0]
        classes |= found[1]
    return functions, classes


def test_functions_have_few_parameters():
    functions, _ = all_too_large()
    assert functions.keys() - PARAMETERS.keys() == set(), "group parameters that belong together in an object"
    assert PARAMETERS.keys() - functions.keys() == set(), "no longer an exception: remove it here"


def test_classes_have_few_attributes():
    _, classes = all_too_large()
    assert classes.keys() - ATTRIBUTES.keys() == set(), "divide the class by responsibility"
    assert ATTRIBUTES.keys() - classes.keys() == set(), "no longer an exception: remove it here"


def test_both_limits_are_found():
    """Seven parameters and thirteen attributes are too many, six and twelve are not."""
    head = "class A:\n  a: int\n  k: ClassVar[int]\n"
    source = head + "  def f(self, b, c, d, e, /, f, *, g{more}):\n    self.x = 1\n{lines}"
    at_most = "".join(f"    self.y{n} = {n}\n" for n in range(10))
    assert too_large(source.format(more="", lines=at_most), "a.py") == ({}, {})
    more = source.format(more=", h", lines=at_most + "    self.z = 1\n")
    assert too_large(more, "a.py") == ({"a.py A.f": 7}, {"a.py A": 13})
