"""Codecs are found by their files, which have the names of the codecs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flexgen
from flexgen import policy
from flexgen.errors import PolicyError
from flexgen.policy import Share
from flexgen.quant import CODECS, codecs

HERE = Path(__file__).parent


def test_every_file_is_a_codec_that_policies_know():
    files = {path.stem for path in Path(codecs.__file__).parent.glob("*.py")} - {"__init__"}
    assert {"int4", "int8", "fp8"} <= files == set(CODECS)
    assert {name: codec.name for name, codec in CODECS.items()} == {name: name for name in files}
    assert ("none", *sorted(files)) == policy.CODECS
    assert all(Share(50, name).codec == name for name in files)


@pytest.mark.slow
def test_a_new_codec_is_one_file(tmp_path):
    """The package with one more file runs, predicts and searches with one more codec."""
    package = tmp_path / "flexgen"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(flexgen.__file__).parent, package, ignore=ignored, copy_function=os.symlink)
    shutil.copy(HERE / "float32_codec.py", package / "quant" / "codecs")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = [sys.executable, str(HERE / "use_new_codec.py"), str(tmp_path)]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(PolicyError, match="codec 'int3' is not known; known: none, .*int4, .*int8"):
        Share(50, "int3")


def test_names_are_known_without_torch():
    code = (
        "import sys; from flexgen.policy import CODECS; assert len(CODECS) > 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
