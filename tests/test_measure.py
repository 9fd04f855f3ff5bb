import json
import shlex

import pytest

from flexgen import measure, simulate
from flexgen.predict.hardware import Hardware
from flexgen.probe import measured as cache


@pytest.fixture(autouse=True)
def calls(monkeypatch, tmp_path):
    """How often the machine was measured, which takes no time here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = []

    def fixed(device, offload_dir, progress):
        measured.append(device)
        progress and [progress(n, 2, "products") for n in range(3)]
        return Hardware.preset("laptop-16g").replace(source=f"measurement {len(measured)}")

    monkeypatch.setattr(cache, "measure", fixed)
    return measured


def run(flags):
    return measure.main(shlex.split(flags))


def test_it_prints_a_machine_and_says_where_it_is_kept(capsys, tmp_path, calls):
    assert run("--device cpu") == 0
    out, err = capsys.readouterr()
    (tmp_path / "printed.toml").write_text(out)
    assert Hardware.load(tmp_path / "printed.toml").source == "measurement 1"
    assert f"cached in {tmp_path / 'cache'}" in err
    assert run("--device cpu") == 0 and calls == ["cpu"]
    assert run("--device cpu --again") == 0 and calls == ["cpu", "cpu"]


def test_a_file(capsys, tmp_path):
    assert run(f"--device cpu -o {tmp_path / 'mine.toml'} --quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert Hardware.load(tmp_path / "mine.toml").source == "measurement 1"


def test_an_error_is_one_line(capsys, tmp_path):
    assert run("--device tpu") == 1
    assert "device 'tpu' is not known" in capsys.readouterr().err
    assert run(f"--device cpu -o {tmp_path / 'nowhere' / 'mine.toml'}") == 1
    assert "nowhere" in capsys.readouterr().err


def test_simulate_takes_the_machine_at_hand(capsys, calls):
    flags = "--hardware measured --device cpu --model opt-125m --prompt-len 16 --gen-len 4 --json -"
    assert simulate.main(shlex.split(flags)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "laptop-16g" and calls == ["cpu"]
