"""What README and docs show is run: commands, Python, policies."""

import re
import shlex
from pathlib import Path

import pytest

from flexgen import bench, simulate
from flexgen.policy import Policy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("text", list(fenced("python")))
def test_python(text):
    exec(compile(text, "snippet", "exec"), {})


@pytest.mark.parametrize("text", list(fenced("toml")))
def test_policy(text, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    policy = Policy.load(path)
    policy.save(path)
    assert Policy.load(path) == policy


@pytest.mark.parametrize("line", list(commands()))
def test_command(line, tmp_path, monkeypatch, capsys):
    (tmp_path / "policies").symlink_to(ROOT / "policies")
    monkeypatch.chdir(tmp_path)
    module, *flags = shlex.split(line)[2:]
    assert {"flexgen.bench": bench, "flexgen.simulate": simulate}[module].main(flags) == 0
    assert "throughput" in capsys.readouterr().out


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "policies").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_policies_load_and_say_where_they_come_from(path):
    Policy.load(path)
    assert path.read_text().startswith("#")
