"""A tiny OPT model in the formats of FlexGen 0.1 and Hugging Face, with the ids that transformers generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from flexgen.flex_opt import CompressionConfig, ExecutionEnv, OptConfig, Policy

VOCAB, POSITIONS, PAD = 96, 64, 1


@dataclass(frozen=True)
class Tiny:
    """Weights in `path/opt-tiny-np` (numpy files) and in `hf/opt-tiny`."""

    config: OptConfig
    path: Path
    hf: Path
    model: OPTForCausalLM

    def greedy(self, prompts: Sequence[Sequence[int]], tokens: int, stop: int | None = None) -> np.ndarray:
        """transformers' ids for prompts that may begin with padding."""
        ids = torch.tensor(prompts)
        with torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=(ids != PAD).long(), max_new_tokens=tokens, do_sample=False,
                pad_token_id=PAD, eos_token_id=stop,
            )  # fmt: skip
        result = np.full((len(ids), ids.shape[1] + tokens), PAD)
        result[:, : out.shape[1]] = out.numpy()
        return result


def save_numpy(model: OPTForCausalLM, folder: Path) -> None:
    """Write the files that 0.1 makes of a checkpoint: no suffix, the last norm under another name, the head twice."""
    folder.mkdir(parents=True)
    for name, tensor in model.model.state_dict().items():
        name = name.replace("decoder.final_layer_norm", "decoder.layer_norm")
        with open(folder / name, "wb") as file:
            np.save(file, tensor.numpy())
    (folder / "lm_head.weight").write_bytes((folder / "decoder.embed_tokens.weight").read_bytes())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    config = OptConfig(
        name="opt-tiny", num_hidden_layers=2, max_seq_len=POSITIONS, hidden_size=64, n_head=4, input_dim=64,
        ffn_embed_dim=96, vocab_size=VOCAB, dtype=np.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2, num_attention_heads=4,
            ffn_dim=96, max_position_embeddings=POSITIONS, pad_token_id=PAD,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm.weight" in name:
                parameter.add_(1.0)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    base = tmp_path_factory.mktemp("opt")
    save_numpy(model, base / "np" / "opt-tiny-np")
    model.save_pretrained(base / "hf" / "opt-tiny")
    return Tiny(config, base / "np", base / "hf", model)


@pytest.fixture(scope="session")
def policy() -> Callable[..., Policy]:
    """`policy(overlap=False)`: a policy of 0.1, all of whose fields are given."""

    def make(*percent: float, **changes: Any) -> Policy:
        weights = CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False)
        cache = CompressionConfig(num_bits=4, group_size=64, group_dim=2, symmetric=False)
        fields: dict[str, Any] = dict(
            gpu_batch_size=2, num_gpu_batches=1, w_gpu_percent=100, w_cpu_percent=0, cache_gpu_percent=100,
            cache_cpu_percent=0, act_gpu_percent=100, act_cpu_percent=0, overlap=True, sep_layer=True,
            pin_weight=True, cpu_cache_compute=False, attn_sparsity=1.0, compress_weight=False,
            comp_weight_config=weights, compress_cache=False, comp_cache_config=cache,
        )  # fmt: skip
        names = [name for name in fields if name.endswith("percent")]
        return Policy(**fields | dict(zip(names, percent, strict=False)) | changes)

    return make


@pytest.fixture
def env(tmp_path: Path) -> Iterator[ExecutionEnv]:
    env = ExecutionEnv.create(str(tmp_path / "offload"))
    yield env
    env.close_copy_threads()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise AssertionError(f"the network was asked for: {args} {options}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
