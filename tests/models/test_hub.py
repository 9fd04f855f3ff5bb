"""Hub ids of repositories with GGUF files, in a cache with the layout of huggingface_hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf_models import Tiny, tiny, write_gguf
from huggingface_hub import snapshot_download  # before the tests' fixture replaces it

from flexgen.errors import ModelError
from flexgen.models import HubOptions, open_model

ONE = ["tiny-Q8_0.gguf"]
SEVERAL = [
    "tiny-Q4_K_M.gguf",
    "tiny-Q4_K_S.gguf",
    "tiny-Q8_0.gguf",
    "BF16/tiny-BF16.gguf",
    "mmproj-tiny.gguf",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", tiny(Tiny("llama")))


@pytest.fixture
def cached(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[str]], HubOptions]:
    """`cached(names)`: options for a cache with copies of a GGUF file under these names, as in org/tiny-GGUF."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    def fill(names: Sequence[str]) -> HubOptions:
        folder, commit = tmp_path / "models--org--tiny-GGUF", "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        for name in names:
            path = folder / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, path)
        return HubOptions(cache_dir=tmp_path, local_files_only=True)

    return fill


def opened(name: str, hub: HubOptions) -> str:
    _, checkpoint = open_model(name, hub=hub)
    assert checkpoint.directory is not None
    return checkpoint.directory.name


def test_the_only_file_needs_no_name(cached: Any) -> None:
    hub = cached([*ONE, "mmproj-tiny.gguf"])
    assert opened("org/tiny-GGUF", hub) == "tiny-Q8_0.gguf"
    assert open_model("org/tiny-GGUF", hub=hub)[0].name == "org/tiny-GGUF"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("tiny-Q4_K_M.gguf", "tiny-Q4_K_M.gguf"),
        ("Q4_K_M", "tiny-Q4_K_M.gguf"),
        ("q8_0", "tiny-Q8_0.gguf"),
        ("BF16/tiny-BF16.gguf", "tiny-BF16.gguf"),
        ("bf16", "tiny-BF16.gguf"),
    ],
)
def test_a_file_is_chosen_by_its_name_or_type(given: str, found: str, cached: Any) -> None:
    assert opened(f"org/tiny-GGUF:{given}", cached(SEVERAL)) == found


def test_several_files_are_listed_with_an_example(cached: Any) -> None:
    message = (
        "org/tiny-GGUF has several GGUF files: add the name of one to the id, for example "
        "'org/tiny-GGUF:tiny-BF16'. The files: BF16/tiny-BF16.gguf, tiny-Q4_K_M.gguf, tiny-Q4_K_S.gguf, "
        "tiny-Q8_0.gguf"
    )
    hub = cached(SEVERAL)
    with pytest.raises(ModelError) as raised:
        open_model("org/tiny-GGUF", hub=hub)
    assert str(raised.value) == message
    assert opened("org/tiny-GGUF:tiny-BF16", hub) == "tiny-BF16.gguf", "the example"


@pytest.mark.parametrize("given", ["Q4_K", "Q5_K_M", "other.gguf", ""])
def test_a_name_without_a_file_lists_those_that_exist(given: str, cached: Any) -> None:
    with pytest.raises(
        ModelError, match=r"has no GGUF file '.*'; its GGUF files: BF16/tiny.*, tiny-Q8_0\.gguf"
    ):
        open_model(f"org/tiny-GGUF:{given}", hub=cached(SEVERAL))


def test_a_name_that_fits_several_files(cached: Any) -> None:
    with pytest.raises(
        ModelError, match=r"several GGUF files: .*The files: tiny-Q8_0\.gguf, tiny-UD-Q8_0\.gguf"
    ):
        open_model("org/tiny-GGUF:Q8_0", hub=cached([*ONE, "tiny-UD-Q8_0.gguf"]))


def test_a_repository_without_gguf_files(cached: Any) -> None:
    hub = cached([])
    with pytest.raises(
        ModelError, match="org/tiny-GGUF: not a local directory, and the hub cannot be reached"
    ):
        open_model("org/tiny-GGUF:Q8_0", hub=hub)


def test_dummy_weights_download_no_gguf_file(cached: Any) -> None:
    with pytest.raises(ModelError, match="with weights='dummy' no GGUF file is downloaded"):
        open_model("org/tiny-GGUF:Q8_0", "dummy", cached(ONE))


def test_a_path_in_place_of_a_hub_id_says_what_to_write() -> None:
    message = r"a\.gguf: there is no such file\. For a file on the hub, write org/tiny-GGUF:BF16/a\.gguf"
    with pytest.raises(ModelError, match=message):
        open_model("org/tiny-GGUF/BF16/a.gguf")


def test_all_parts_of_the_chosen_model_are_downloaded_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "repository", tmp_path / "snapshot"
    (source / "Q8").mkdir(parents=True)
    target.mkdir()
    model = tiny(Tiny("llama"))
    for path in (source / "tiny-F16.gguf", source / "Q8" / "tiny-Q8_0.gguf"):
        write_gguf(path, "llama", model, size=20_000)
    names = [str(path.relative_to(source)) for path in sorted(source.rglob("*.gguf"))]
    chosen = [name for name in names if name.startswith("Q8/")]
    assert len(chosen) > 1 and len(names) > len(chosen) + 1

    def download(
        repository: str, allow_patterns: list[str], ignore_patterns: Sequence[str] = (), dry_run: bool = False
    ) -> Any:
        found = [name for name in names if any(fnmatch(name, each) for each in allow_patterns)]
        if dry_run:
            return [SimpleNamespace(filename=name) for name in found]
        for name in found:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        ModelError, match=r"several GGUF files: .*'org/tiny-GGUF:tiny-Q8_0'. The files: Q8/.*00001"
    ):
        open_model("org/tiny-GGUF")
    assert not any(target.iterdir())
    spec, _ = open_model("org/tiny-GGUF:q8_0")
    assert spec.family == "llama"
    assert [str(path.relative_to(target)) for path in sorted(target.rglob("*.gguf"))] == chosen
