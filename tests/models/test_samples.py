"""The sample of a tensor's bytes for comparisons."""

import pytest

from flexgen.models.samples import sample

BLOCK = 4096


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK, 3 * BLOCK])
def test_few_bytes_are_read_whole(nbytes, tmp_path):
    data = bytes(n % 251 for n in range(nbytes + 20))
    (tmp_path / "file").write_bytes(data)
    assert sample(tmp_path / "file", 7, nbytes) == data[7 : 7 + nbytes]


def test_of_many_bytes_both_ends_and_the_middle_are_read(tmp_path):
    data = bytes(7) + b"a" * BLOCK + b"." * 5000 + b"b" * BLOCK + b"." * 5000 + b"c" * BLOCK + bytes(9)
    (tmp_path / "file").write_bytes(data)
    assert sample(tmp_path / "file", 7, len(data) - 16) == b"a" * BLOCK + b"b" * BLOCK + b"c" * BLOCK
