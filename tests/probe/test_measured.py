"""The cache of measurements: used if nothing has changed, otherwise the machine is measured again."""

import logging
import os

import pytest
import torch

from flexgen.errors import HardwareError, RequestError
from flexgen.policy import Tier
from flexgen.predict.hardware import Hardware
from flexgen.probe import measured as cache


@pytest.fixture
def calls(monkeypatch, tmp_path, host):
    """Devices that were measured; the measurement itself is a fixed one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = []

    def measure(device, offload_dir, progress):
        measured.append(str(device))
        return host(source=f"measurement {len(measured)}")

    monkeypatch.setattr(cache, "measure", measure)
    return measured


def files(tmp_path):
    folder = tmp_path / "cache" / "flexgen" / "hardware"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_second_use_does_not_measure(calls, tmp_path):
    first, second = cache.measured("cpu"), cache.measured("CPU ")
    assert calls == ["cpu"]
    assert (first.source, second.source) == ("measurement 1", "measurement 1")
    [kept] = files(tmp_path)
    assert kept.name.startswith("cpu-") and Hardware.load(kept).source == "measurement 1"


def test_capacity_is_asked_at_every_use(calls, monkeypatch):
    cache.measured("cpu")
    monkeypatch.setattr("flexgen.memory.machine.available_bytes", lambda cached: 2_000_000)
    assert cache.measured("cpu").capacity[Tier.CPU] == 1_900_000
    assert calls == ["cpu"]


def test_again_measures_and_keeps(calls):
    cache.measured("cpu")
    assert cache.measured("cpu", again=True).source == "measurement 2"
    assert cache.measured("cpu").source == "measurement 2"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flexgen.probe.measured.processor", lambda: "another CPU"),
        ("flexgen.probe.measured._own_version", lambda: "99"),
        ("flexgen.probe.measured._FORM", -1),
        ("torch.__version__", "99"),
        ("platform.node", lambda: "another machine"),
    ],
)
def test_another_machine_or_version_is_measured(calls, monkeypatch, name, value):
    cache.measured("cpu")
    monkeypatch.setattr(name, value)
    cache.measured("cpu")
    assert calls == ["cpu", "cpu"]


def test_another_number_of_threads_is_measured(calls):
    threads = torch.get_num_threads()
    cache.measured("cpu")
    try:
        torch.set_num_threads(threads + 1)
        cache.measured("cpu")
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 2


def test_another_device_or_disk_is_measured(calls, monkeypatch, tmp_path, machine):
    cache.measured("cpu", tmp_path)
    real = os.stat

    def stat(path, **options):
        found = real(path, **options)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:10])) if path == tmp_path else found

    monkeypatch.setattr(cache.os, "stat", stat)
    cache.measured("cpu", tmp_path)
    assert len(calls) == 2
    monkeypatch.setattr(cache, "measure", lambda *given: calls.append(given[0]) or machine())
    for spec in ("emulated:memory=1MiB", "emulated:memory=2MiB", "emulated:memory=2MiB"):
        assert cache.measured(spec, tmp_path).capacity[Tier.GPU] in (2**20, 2**21)
    assert calls[2:] == ["emulated:memory=1MiB", "emulated:memory=2MiB"]


def test_figures_of_a_busy_machine_are_not_kept(calls, monkeypatch, tmp_path, host, caplog):
    monkeypatch.setattr(cache, "measure", lambda *given: host(disturbed=0.6))
    assert cache.measured("cpu").disturbed == 0.6
    assert files(tmp_path) == [] and "60% of the processors" in caplog.text


@pytest.mark.parametrize("damage", ["", "name = ", "name = 'x'", "\0"])
def test_a_damaged_file_is_measured_again_with_a_warning(calls, tmp_path, caplog, damage):
    cache.measured("cpu")
    [kept] = files(tmp_path)
    kept.write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert cache.measured("cpu").source == "measurement 2"
    assert "measuring the machine again" in caplog.text and kept.name in caplog.text
    assert Hardware.load(kept).source == "measurement 2"


def test_a_cache_that_cannot_be_written_is_a_warning(calls, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert cache.measured("cpu").source == "measurement 1"
    assert "cannot cache the measurement" in caplog.text


def test_a_failed_write_leaves_nothing(calls, tmp_path, monkeypatch, caplog):
    def full(partial, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        cache.measured("cpu")
    assert "No space left" in caplog.text and files(tmp_path) == []


def test_names(calls, machine, tmp_path):
    assert cache.find_hardware("measured", "cpu").source == "measurement 1"
    assert cache.find_hardware("this", "cpu").source == "measurement 1"
    assert cache.find_hardware("t4").name == "t4" and len(calls) == 1
    machine(name="mine").save(path := tmp_path / "mine.toml")
    assert cache.find_hardware(str(path)).name == "mine"
    with pytest.raises(HardwareError, match="'messured' is not known"):
        cache.find_hardware("messured")


def test_a_device_that_is_not_there(calls):
    with pytest.raises(RequestError, match="'tpu' is not known"):
        cache.measured("tpu")
    assert not calls
