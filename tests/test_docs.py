"""What README and docs show is run: commands, Python, policies."""

import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from tiny_families import TINY

from flexgen.policy import Policy
from flexgen.schedule.orders import ORDERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def fenced(language):
    """(page, text) of every fenced block in a language."""
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            yield pytest.param(text, id=f"{page.name}-{text.splitlines()[0][:40]}")


def commands():
    for block in fenced("sh"):
        for line in block.values[0].splitlines():
            if line.startswith("python -m flexgen."):
                yield pytest.param(line, id=line.removeprefix("python -m "))


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A working directory with the shipped policies and some prompts."""
    (tmp_path / "policies").symlink_to(ROOT / "policies")
    (tmp_path / "prompts.txt").write_text("Date: 26 Apr 2019\nDate: 3 May 2020\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("text", list(fenced("python")))
def test_python(text, somewhere):
    known = set(ORDERS)
    try:
        exec(compile(text, "snippet", "exec"), {})
    finally:
        for name in ORDERS.keys() - known:
            del ORDERS[name]


def test_the_family_of_the_walk_is_the_one_in_the_repository():
    """docs/adding-a-model.md: its table is the file of the family, and its tiny configs are those that tests use."""
    table, tiny = (block.values[0] for block in fenced("python") if block.id.startswith("adding-a-model.md"))
    assert table == (ROOT / "flexgen" / "models" / "families" / "ernie4_5.py").read_text()
    names = {}
    exec(tiny, names)
    assert names["TINY"]["ernie4_5"] == TINY["ernie4_5"]


@pytest.mark.parametrize("text", list(fenced("toml")))
def test_policy(text, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    policy = Policy.load(path)
    policy.save(path)
    assert Policy.load(path) == policy


SHOWS = dict.fromkeys(["flexgen.bench", "flexgen.simulate", "flexgen.flex_opt"], "throughput")
"""What a command's output has, where it is not just any."""


@pytest.mark.parametrize("line", list(commands()))
def test_command(line, somewhere, capsys):
    module, *flags = shlex.split(line)[2:]
    if module == "flexgen.bench" and "--model" not in flags:  # 1024 prompts by default
        flags += ["--num-prompts", "48"]
    assert importlib.import_module(module).main(flags) == 0
    out = capsys.readouterr().out
    assert out.strip() and SHOWS.get(module, "") in out


# What the main test of a clone is, and what sets up an environment.
NOT_RUN = {"make demo", "make test", "make test-cuda", "pip install ."}


def test_every_line_of_a_shell_block_is_run():
    for block in fenced("sh"):
        for line in block.values[0].splitlines():
            line = line.partition("  #")[0].strip()
            assert line in NOT_RUN or line.startswith("python -m flexgen."), f"{block.id}: {line}"


def test_every_block_is_of_a_language_that_is_run():
    for page in PAGES:
        fences = re.findall(r"^ *(?:`{3,}|~{3,})(.*)$", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) % 2 == 0 and not any(fences[1::2]), f"{page.name}: a fence is open"
        # Without a language: a drawing.
        assert set(fences[::2]) <= {"python", "sh", "toml", ""}, f"{page.name}: {set(fences[::2])}"


def named_in_the_text():
    """Commands inside of sentences and tables, which may leave out what they need to run."""
    for page in PAGES:
        for line in re.findall(r"(?<!`)`(python -m flexgen\.[^`]+)`", page.read_text(encoding="utf-8")):
            yield pytest.param(line, id=f"{page.name}-{line.removeprefix('python -m ')}")


@pytest.mark.parametrize("line", list(named_in_the_text()))
def test_commands_in_sentences_exist_and_know_their_flags(line, capsys):
    module, *flags = shlex.split(line)[2:]
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    known = re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)
    assert {flag for flag in flags if flag.startswith("--")} <= set(known)


def test_the_readme_shows_each_interface_in_ten_lines():
    faces = re.split(r"^## ", PAGES[0].read_text(encoding="utf-8"), flags=re.M)
    (section,) = [text for text in faces if text.startswith("Three interfaces")]
    blocks = re.findall(r"^```\w+\n(.*?)^```", section, re.M | re.S)
    assert len(blocks) == 3 and max(len(block.splitlines()) for block in blocks) <= 10


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\((docs/[^)#]+)\)", PAGES[0].read_text(encoding="utf-8"))
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} <= set(linked)


def test_links_into_pages_lead_to_headings():
    for page in TEXTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            text = (page.parent / target if target else page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", text, re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name}: {target}#{anchor}"


def test_links_lead_somewhere():
    for page in TEXTS:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


WRITTEN_BY_COMMANDS = {"benchmarks/results/gpu/", "build/site"}


def test_files_that_are_named_exist():
    """Paths such as `layout/plan.py` or `tests/layout/test_plan.py`, from the root or from the package."""
    bases = ROOT, ROOT / "flexgen"
    for page in TEXTS:
        for name in re.findall(r"`([\w.-]+/[\w./-]*)`", page.read_text(encoding="utf-8")):
            ours = any((base / name.split("/")[0]).is_dir() for base in bases)
            exists = any((base / name).exists() for base in bases)
            assert exists or not ours or name in WRITTEN_BY_COMMANDS, f"{page.name}: {name}"


OF_OTHER_VERSIONS = {"from-flexgen.md", "CHANGELOG.md"}
"""They also name modules that are not there, or no longer."""


def test_names_in_the_package_exist():
    """Names such as `flexgen.search.find_policy`."""
    for page in TEXTS:
        if page.name not in OF_OTHER_VERSIONS:
            text = page.read_text(encoding="utf-8")
            for name in re.findall(r"(?:`|::: )(flexgen(?:\.[A-Za-z_]\w*)+)", text):
                pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", sorted((ROOT / "policies").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_policies_load_and_say_where_they_come_from(path):
    Policy.load(path)
    assert path.read_text().startswith("#")
