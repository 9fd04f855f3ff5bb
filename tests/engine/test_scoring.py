"""Log-likelihoods and perplexity against float64 and against transformers, one text at a time."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, OPTConfig

from flexgen import OptLM, Policy, bench
from flexgen.demo import MODEL_DIR, records
from flexgen.engine.scoring import calls_of, log_likelihoods, perplexity, score
from flexgen.errors import CapacityError

THIRDS = {"gpu": 34, "cpu": 33, "disk": 33}
CONFIGS = {
    "opt": OPTConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
    "llama": LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    ),
}  # fmt: skip


def by_transformers(model, ids, skip=0):
    """Log-likelihoods of the ids behind the first `skip` (at least one), from transformers' own loss."""
    text = torch.tensor([ids])
    labels = text.clone()
    labels[:, :skip] = -100
    with torch.no_grad():
        mean = model(text, attention_mask=torch.ones_like(text), labels=labels).loss.item()
    return -mean * (len(ids) - max(skip, 1))


@given(tokens=st.integers(1, 9), vocab=st.integers(1, 40), scale=st.floats(0, 50), seed=st.integers(0, 9))
def test_log_likelihoods_are_those_of_float64(tokens, vocab, scale, seed):
    random = np.random.default_rng(seed)
    logits, ids = random.normal(size=(tokens, vocab)) * scale, random.integers(0, vocab, tokens)
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = log_likelihoods(torch.from_numpy(logits), ids.tolist())
    assert found.dtype == torch.float32 and found.shape == (tokens - 1,)
    np.testing.assert_allclose(found, exact[np.arange(tokens - 1), ids[1:]], rtol=1e-5, atol=1e-5)


def test_half_types_are_summed_in_float32():
    logits = torch.zeros(2, 5000, dtype=torch.bfloat16)
    assert log_likelihoods(logits, [0, 7]).item() == pytest.approx(-math.log(5000), rel=1e-6)


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 3, 4]])
def test_ids_must_be_those_of_the_logits(ids):
    with pytest.raises(ValueError, match=r"\(3, 5\) and ids"):
        log_likelihoods(torch.zeros(3, 5), ids)


def test_every_token_counts_once():
    sure, torn = torch.log(torch.tensor([1.0])), torch.log(torch.tensor([0.5, 0.5, 0.5]))
    assert perplexity([sure, torn]) == pytest.approx(2**0.75)


@pytest.mark.parametrize("scores", [[], [torch.empty(0)]])
def test_no_tokens_have_no_perplexity(scores):
    with pytest.raises(ValueError, match="no tokens"):
        perplexity(scores)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=7),
    rows=st.integers(1, 4),
    family=st.sampled_from(sorted(CONFIGS)),
)
def test_texts_score_as_in_transformers(lengths, rows, family, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"scored-{family}"
    if not folder.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    random = np.random.default_rng(len(lengths))
    texts = [random.integers(3, 96, length).tolist() for length in lengths]
    policy = Policy(gpu_batch_size=3, weights=THIRDS, cache=THIRDS, activations=THIRDS)
    with OptLM(folder, policy, device="cpu", dtype="float32", progress=False) as model:
        found = score(model.forward, texts, rows)
    assert [len(scores) + 1 for scores in found] == lengths
    for scores, ids in zip(found, texts, strict=True):
        assert scores.sum().item() == pytest.approx(by_transformers(reference, ids), rel=1e-4)


def test_answers_to_one_question_run_together():
    """Two questions with three answers each, one with a single answer, and texts that share nothing."""
    random = np.random.default_rng(0)
    questions = [random.integers(3, 90, length).tolist() for length in (60, 80, 70)]
    answers = [*[(0, n) for n in range(3)], (2, 0), *[(1, n) for n in range(3)]]
    texts = [[*questions[q], 3 + n, 7] for q, n in answers] + [random.integers(3, 90, 9).tolist()] * 2
    asked = []

    def forward(ids):
        asked.append(sorted(texts.index(text) for text in ids))
        return torch.zeros(len(ids), max(map(len, ids)), 96)

    for call_positions, together in ((8, True), (100_000, False), (math.inf, False)):
        asked.clear()
        found = score(forward, texts, 4, call_positions)
        assert [len(scores) + 1 for scores in found] == [len(text) for text in texts]
        assert ([0, 1, 2] in asked and [4, 5, 6] in asked) == together
        assert sorted(n for call in asked for n in call) == [0, 1, 2, 3, 4, 5, 6, 7, 7]


def test_the_best_level_of_a_tree_is_shared():
    """All texts begin with one instruction, and three of each document with that document too."""
    random = np.random.default_rng(0)
    instruction = random.integers(3, 90, 40).tolist()
    documents = [random.integers(3, 90, 100).tolist() for _ in range(4)]
    texts = [[*instruction, *document, 3 + n] for n in range(3) for document in documents]
    calls = list(calls_of(texts, 12, call_positions=16))
    assert sorted(map(sorted, calls)) == [[d, d + 4, d + 8] for d in range(4)]
    assert list(map(sorted, calls_of(texts, 12, call_positions=5000))) == [list(range(12))]


@pytest.mark.slow
def test_bench_reports_the_perplexity_of_the_right_answers(tmp_path, capsys):
    count, out = 12, tmp_path / "out.jsonl"
    flags = f"--device cpu --dtype float32 --num-prompts {count} --gen-len 2 --no-bound --json {out}"
    assert bench.main(flags.split()) == 0
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    reference = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for record in records(count, seed=0):
        prompt, text = (tokenizer(part).input_ids for part in (record.prompt, record.text))
        assert text[: len(prompt)] == prompt
        total += by_transformers(reference, text, skip=len(prompt))
        tokens += len(text) - len(prompt)
    found = json.loads(out.read_text())["perplexity"]
    assert found - 1 == pytest.approx(math.exp(-total / tokens) - 1, rel=1e-3)
    assert f"{found:.4f} of the correct answers" in capsys.readouterr().out


def test_bench_without_known_answers_has_no_perplexity(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = f"--device cpu --prompt-len 8 --gen-len 2 --num-prompts 2 --no-bound --json {out}"
    assert bench.main(flags.split()) == 0
    assert json.loads(out.read_text())["perplexity"] is None
    assert "perplexity" not in capsys.readouterr().out


def test_bench_gives_its_times_where_texts_do_not_fit(tmp_path, monkeypatch):
    def refuse(self, texts):
        raise CapacityError("the logits need more than there is")

    monkeypatch.setattr(OptLM, "forward", refuse)
    out = tmp_path / "out.jsonl"
    flags = f"--device cpu --num-prompts 4 --gen-len 2 --no-bound --json {out}"
    assert bench.main(flags.split()) == 0
    found = json.loads(out.read_text())
    assert found["perplexity"] is None and found["throughput_tokens_s"] > 0
