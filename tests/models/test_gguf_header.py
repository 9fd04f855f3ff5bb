"""Headers of GGUF files: equal to what the package reads, and errors for damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_models import Tiny, tiny, write_gguf

from flexgen.errors import CheckpointError
from flexgen.models.gguf_header import read_gguf_header


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = {"tokenizer.ggml.tokens": ["a", "\N{SNOWMAN}"], "llama.sizes": [3, 4], "general.flag": True}
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, "llama", tiny(Tiny("llama")), kind="Q8_0", changes=vocabulary)


def test_it_equals_what_the_package_reads(file: Path) -> None:
    header, theirs = read_gguf_header(file), gguf.GGUFReader(file)
    assert header.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        stored = header.tensors[tensor.name]
        assert stored.kind == tensor.tensor_type.name
        assert stored.shape == tuple(tensor.shape.tolist())[::-1]
        assert (stored.offset, stored.nbytes) == (tensor.data_offset, tensor.n_bytes)
    for name, value in header.values.items():
        contents = theirs.fields[name].contents()
        if name == "tokenizer.ggml.tokens":
            assert value is None
        else:
            assert value == (tuple(contents) if isinstance(contents, list) else contents)


def test_every_truncation_is_an_error(file: Path, tmp_path: Path) -> None:
    data, part = file.read_bytes(), tmp_path / "part.gguf"
    tensors = gguf.GGUFReader(file).tensors
    end = max(tensor.data_offset + int(tensor.n_bytes) for tensor in tensors)
    for length in [*range(0, 400, 7), *range(400, end, 997), end - 1]:
        part.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="truncated|not a GGUF file|damaged"):
            read_gguf_header(part)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_header_is_an_error_or_read(seed: int, file: Path, tmp_path: Path) -> None:
    """Any bytes: no other exception, and no endless loop."""
    random = np.random.default_rng(seed)
    data = bytearray(file.read_bytes())
    begin = int(random.integers(4, 1500))
    data[begin : begin + 8] = random.bytes(8)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    try:
        read_gguf_header(damaged)
    except CheckpointError as error:
        assert str(damaged) in str(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(20), "not a GGUF file: it starts with b'GGML'"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(20), "version 1 of GGUF is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(20), "version 50331648 of GGUF is not supported"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "a string has 1152921504606846976 bytes"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99), "a value has the unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**60), "it ends after"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**60), "it ends after"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 9), "'a' has 9 dimensions"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 4, 199, 0) + bytes(64),
            "'a' has the type 199",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 33, 2, 0) + bytes(99),
            r"\(33,\) in Q4_0 is at",
        ),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_gguf_header(path)
