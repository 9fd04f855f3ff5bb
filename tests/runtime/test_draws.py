"""Random numbers by seed, row and token: the published algorithm, and nothing else that they depend on."""

import numpy as np
import pytest
import torch

from flexgen.runtime.draws import MAX_SEED, philox, seed_from_torch, uniforms

CPU = torch.device("cpu")


# counter, key, words: the known answers of Random123 (tests/kat_vectors, "philox4x32 10").
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, words):
    low, high = (int(word, 16) for word in key.split())
    column = np.array([[int(word, 16)] for word in counter.split()], dtype=np.uint64)
    # With another counter: each column is independent.
    made = philox(np.concatenate([column, column ^ np.uint64(1)], axis=1), high << 32 | low)
    assert [f"{int(word):08x}" for word in made[:, 0]] == words.split()
    assert (made[:, 0] != made[:, 1]).all()


def test_a_number_has_53_bits_of_two_words():
    words = [int(word[0]) for word in philox(np.array([[7], [0], [9], [0]], dtype=np.uint64), 5)]
    assert uniforms(5, [7], 9, CPU).tolist() == [((words[0] << 32 | words[1]) >> 11) / 2**53]


def test_a_row_has_its_number_whatever_the_others_are():
    whole = uniforms(3, range(1000), 4, CPU)
    assert whole.dtype == torch.float64 and ((whole >= 0) & (whole < 1)).all()
    rows = [17, 3, 999, 500]
    assert uniforms(3, rows, 4, CPU).equal(whole[rows])
    assert uniforms(3, [], 4, CPU).shape == (0,)


def test_rows_may_have_different_tokens():
    rows, tokens = [17, 3, 17, 500], [4, 9, 0, 4]
    each = [uniforms(3, [row], token, CPU) for row, token in zip(rows, tokens, strict=True)]
    assert uniforms(3, rows, tokens, CPU).equal(torch.cat(each))


def test_each_part_counts_in_full():
    least, most = 1, (1 << 63) + 1  # the upper word counts too
    made = [
        float(uniforms(seed, [row], token, CPU))
        for seed in (0, least, most, MAX_SEED)
        for row in (0, least, most)
        for token in (0, least, most)
    ]
    assert len(set(made)) == len(made)


def test_they_are_spread_evenly_over_rows_and_tokens():
    table = torch.stack([uniforms(11, range(500), token, CPU) for token in range(200)])
    counts = torch.histc(table.float(), 100, 0, 1)
    # Chi-squared of 99 degrees of freedom: above 180 with a chance of 1e-6.
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 180
    for shifted in (table[1:, :] - table[:-1, :], table[:, 1:] - table[:, :-1]):
        wrapped = torch.histc((shifted % 1).float(), 100, 0, 1)  # neighbours are independent
        assert float(((wrapped - wrapped.mean()) ** 2 / wrapped.mean()).sum()) < 180


def test_a_seed_from_torch_follows_manual_seed():
    torch.manual_seed(3)
    first, second = seed_from_torch(), seed_from_torch()
    torch.manual_seed(3)
    assert (seed_from_torch(), seed_from_torch()) == (first, second) and first != second
