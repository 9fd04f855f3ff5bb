"""Converted weights of the memory tiers that the offload directory keeps for later starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from piece_sizes import piece_sizes
from torch import Tensor

from flexgen.errors import CapacityError, RequestError
from flexgen.memory import known_finite, mapped_files
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.homes import HostRegion
from flexgen.memory.machine import Machine
from flexgen.models import tensor_files
from flexgen.policy import Share, Split, Tier

WIDE = dict(hidden_size=128, ffn_dim=192, word_embed_proj_dim=128)  # whole groups
IN_MEMORY = Split(gpu=Share(30, "int8"), cpu=Share(70, "int4"))
MIXED = Split(gpu=Share(20, "int4"), cpu=Share(40, "int4"), disk=Share(40, "int8"))

Stream, Saved = Callable[..., Any], Callable[..., Path]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of weights that were read from the checkpoint as values."""
    keys: list[str] = []
    read = tensor_files.SafetensorsCheckpoint.read

    def noted(self: Any, weight: Any, dtype: torch.dtype, rows: range | None = None) -> Tensor:
        keys.append(weight.key)
        return read(self, weight, dtype, rows)

    monkeypatch.setattr(tensor_files.SafetensorsCheckpoint, "read", noted)
    return keys


@pytest.fixture
def maps_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mapped_files, "LEAST_BYTES", 1)
    monkeypatch.setattr(known_finite, "cache_folder", lambda kind: tmp_path / "cache" / kind)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def stored(model: Any) -> dict[str, Tensor]:
    """The bytes that each weight in memory has at home."""
    found = {}
    for layer in model.layers:
        for weight in layer.weights:
            home = model.homes[weight]
            if isinstance(home, HostRegion):
                home = home.buffer[home.offset : home.offset + home.nbytes]
            if isinstance(home, Tensor):
                found[weight.key] = (
                    (home.to_dense() if home.is_mkldnn else home).flatten().view(torch.uint8).clone()
                )
    return found


def expected(model: Any) -> dict[str, Tensor]:
    """The same, encoded at once."""
    found = {}
    for layer in model.layers:
        for weight in layer.weights:
            codec, value = model.placement.codec(weight), model.checkpoint.read(weight, model.dtype)
            encoded = codec.encode(value) if codec else value
            if model.placement.of(weight) is not Tier.DISK:
                found[weight.key] = encoded.flatten().view(torch.uint8)
    return found


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.usefixtures("maps_all")
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("split", [IN_MEMORY, MIXED], ids=["memory", "mixed"])
def test_the_second_start_encodes_nothing(
    stream: Stream, saved: Saved, encoded: list[str], tmp_path: Path, device: str, split: Split
) -> None:
    directory, offload = saved("opt", **WIDE), tmp_path / "offload"
    with stream(directory, split, device, offload_dir=offload, fast_start=True) as first:
        before = stored(first)
        assert_equal(before, expected(first))
        assert bool(first.machine.host.cached) == (device == "cpu"), "norms are mapped from the checkpoint"
        converted = {w.key for layer in first.layers for w in layer.weights if first.placement.codec(w)}
    written = files(offload)
    assert written
    encoded.clear()
    second = stream(directory, split, device, offload_dir=offload, fast_start=True)
    assert not converted & set(encoded)
    assert_equal(stored(second), before)
    assert files(offload) == written
    if device == "cpu" and split is IN_MEMORY:  # there are no slots for weights on disk
        assert second.machine.host.cached == second.machine.host.used, "everything is mapped"


@pytest.mark.usefixtures("maps_all")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_another_dtype_are_kept_too(
    stream: Stream,
    saved: Saved,
    encoded: list[str],
    tmp_path: Path,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flexgen.memory.gpu.has_prelayout", lambda dtype: False)
    for _ in range(2):
        encoded.clear()
        with stream(
            saved("llama"), Split(cpu=100), dtype=dtype, offload_dir=tmp_path, fast_start=True
        ) as model:
            found, read = stored(model), set(encoded)
            assert_equal(found, expected(model))
    assert read == set()


def test_nothing_is_kept_unless_it_is_asked_for(stream: Stream, saved: Saved, tmp_path: Path) -> None:
    stream(saved("opt", **WIDE), IN_MEMORY, offload_dir=tmp_path)
    assert files(tmp_path) == {}
    model = stream(saved("opt", **WIDE), MIXED, offload_dir=tmp_path)
    assert len(files(tmp_path)) <= len(model.layers), "those of the disk tier only"
    stream(saved("opt", **WIDE), IN_MEMORY, fast_start=True)  # without a directory that stays


def test_a_start_that_keeps_nothing_uses_what_another_kept(
    stream: Stream, saved: Saved, encoded: list[str], tmp_path: Path
) -> None:
    stream(saved("opt", **WIDE), IN_MEMORY, offload_dir=tmp_path, fast_start=True)
    encoded.clear()
    model = stream(saved("opt", **WIDE), IN_MEMORY, offload_dir=tmp_path)
    assert not set(encoded) & {
        w.key for layer in model.layers for w in layer.weights if model.placement.codec(w)
    }


def test_a_changed_checkpoint_is_encoded_again(stream: Stream, saved: Saved, tmp_path: Path) -> None:
    directory, offload = shutil.copytree(saved("opt", **WIDE), tmp_path / "model"), tmp_path / "offload"
    with stream(directory, IN_MEMORY, offload_dir=offload, fast_start=True) as model:
        before, old = stored(model), files(offload)
    path = directory / "model.safetensors"
    data, status = path.read_bytes(), path.stat()
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # a file system's clock ticks in milliseconds
        path.write_bytes(data[:-4000] + bytes(2000) + data[-2000:])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    model = stream(directory, IN_MEMORY, offload_dir=offload, fast_start=True)
    assert_equal(stored(model), expected(model))
    assert any(not torch.equal(before[key], value) for key, value in stored(model).items())
    assert not set(old) & set(files(offload)), "and the old files are removed"


@pytest.mark.parametrize("damage", ["shorter", "header", "byte"])
def test_a_damaged_file_is_never_used(stream: Stream, saved: Saved, tmp_path: Path, damage: str) -> None:
    with stream(saved("opt", **WIDE), IN_MEMORY, offload_dir=tmp_path, fast_start=True) as model:
        right = stored(model)
    for path in files(tmp_path):
        data, status = path.read_bytes(), path.stat()
        wrong = {
            "shorter": data[:-64],
            "header": data.replace(b"U8", b"I8"),
            "byte": data[:-1] + bytes([data[-1] ^ 1]),
        }
        while path.stat().st_ctime_ns == status.st_ctime_ns:
            path.write_bytes(wrong[damage])
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    model = stream(saved("opt", **WIDE), IN_MEMORY, offload_dir=tmp_path, fast_start=True)
    assert_equal(stored(model), right)


@pytest.mark.parametrize("limit", ["disk", "max_memory"])
def test_too_little_room_is_a_warning(
    stream: Stream,
    saved: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limit: str,
) -> None:
    if limit == "disk":
        monkeypatch.setattr(DiskStore, "free", property(lambda self: 1000))
    else:
        opened = Machine.open
        limited = lambda *args: opened(*args[:2], max_memory={Tier.DISK: 1000})  # noqa: E731
        monkeypatch.setattr(Machine, "open", limited)
    model = stream(saved("opt", **WIDE), IN_MEMORY, offload_dir=tmp_path, fast_start=True)
    assert_equal(stored(model), expected(model))
    assert files(tmp_path) == {}
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert (
        "are not kept for later starts: they need" in record.message and "has 1000 B free" in record.message
    )


@pytest.mark.parametrize("error", [CapacityError("the disk is full"), RequestError("it is read-only")])
def test_a_disk_that_fills_up_while_weights_are_written_is_one_warning(
    stream: Stream,
    saved: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    publish, left = DiskStore.publish, [3]

    def publish_some(self: DiskStore, *args: Any) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return publish(self, *args)

    monkeypatch.setattr(DiskStore, "publish", publish_some)
    model = stream(saved("opt", **WIDE), IN_MEMORY, offload_dir=tmp_path, fast_start=True)
    assert_equal(stored(model), expected(model))
    assert left == [-1]
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert str(error) in record.message
    monkeypatch.setattr(DiskStore, "publish", publish)
    model = stream(saved("opt", **WIDE), IN_MEMORY, offload_dir=tmp_path, fast_start=True)
    assert_equal(stored(model), expected(model))


@pytest.mark.slow
def test_processes_that_start_together_keep_the_same_files(saved: Saved, tmp_path: Path) -> None:
    code = """
import sys
from flexgen import OptLM, Policy
weights = {"cpu": {"percent": 100, "codec": "int4"}}
policy = Policy(gpu_batch_size=1, weights=weights, cache={"cpu": 100}, activations={"cpu": 100})
for _ in range(3):
    model = OptLM(sys.argv[1], policy, device="cpu", offload_dir=sys.argv[2], fast_start=True, progress=False)
    with model:
        print(*model.generate([[5, 6, 7, 8]], 6, stop=())[0])
"""
    words = [sys.executable, "-c", code, str(saved("opt", **WIDE)), str(tmp_path)]
    running = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    ended = [(*each.communicate(timeout=200), each.returncode) for each in running]
    assert [code for *_, code in ended] == [0, 0, 0], ended
    assert len({line for out, *_ in ended for line in out.splitlines()}) == 1
    assert not list(tmp_path.rglob("*part*")), "nothing half-written"


@pytest.mark.slow
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tiers=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["none", "int4", "int8", "fp8"])), min_size=3, max_size=3
    ).filter(lambda tiers: any(share for share, _ in tiers)),
    device=st.sampled_from(["cpu", "emulated"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    piece=st.sampled_from([100, 4096, 1 << 20]),
)
@pytest.mark.usefixtures("maps_all")
def test_any_placement_is_the_same_with_and_without_kept_files(
    stream: Stream,
    saved: Saved,
    tmp_path_factory: pytest.TempPathFactory,
    tiers: Any,
    device: str,
    dtype: Any,
    piece: int,
) -> None:
    total = sum(share for share, _ in tiers)
    split = Split(
        **{
            name: Share(100 * share / total, codec)
            for name, (share, codec) in zip(("gpu", "cpu", "disk"), tiers, strict=True)
            if share
        }
    )
    found: list[dict[str, Tensor]] = []
    offload = tmp_path_factory.mktemp("offload")
    with piece_sizes(thread_bytes=piece, read_bytes=2 * piece):
        for _ in range(2):
            with stream(
                saved("opt", **WIDE), split, device, dtype=dtype, offload_dir=offload, fast_start=True
            ) as model:
                found.append(stored(model))
                wanted = expected(model)
    assert_equal(found[0], wanted)
    assert_equal(found[1], wanted)
