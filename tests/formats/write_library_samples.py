"""Writes `library_samples.safetensors`: matrices that the libraries of the formats quantized, and their values.

    python tests/formats/write_library_samples.py compressed-tensors    # in an environment with compressed-tensors
    python tests/formats/write_library_samples.py gptqmodel             # in one with gptqmodel

Each library has its own environment, because their requirements conflict. A run replaces the samples of its library.
The file has, for each sample, the tensors of a checkpoint by suffix and the `values` to which the library itself
decodes them, in float32. Its metadata have the quantization_config of each sample and the version of the library.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = Path(__file__).with_name("library_samples.safetensors")
SHAPE = 32, 64
Sample = tuple[str, dict[str, Any], dict[str, Tensor]]
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"group_size": 32},
    "W4A16_ASYM": {"group_size": 32},
    "W8A16": {"group_size": 64},
    "FP8_BLOCK": {"block_structure": [16, 32]},
    "FP8_DYNAMIC": {},
    "NVFP4A16": {},
    "MXFP4A16": {},
}
"""Presets of compressed-tensors, with the arguments of their weights that a small matrix needs."""


def compressed_tensors() -> Iterator[Sample]:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    for name, arguments in SCHEMES.items():
        module = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
        scheme = preset_name_to_scheme(name, targets=["Linear"])
        if not name.startswith("FP8"):
            scheme.input_activations = None
        scheme.weights = scheme.weights.model_copy(update=arguments)
        model = torch.nn.Sequential(module)
        apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}))
        weights, w = module.quantization_scheme.weights, module.weight.data
        groups = _grouped(w, weights)
        overall = None
        if hasattr(module, "weight_global_scale"):
            overall = generate_gparam(w.amin(), w.amax())
            module.weight_global_scale.data = overall
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights, overall)
        module.weight_scale.data = scale
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        tensors = {f".{key.rpartition('.')[2]}": tensor for key, tensor in model.state_dict().items()}
        if "fp4" in str(compressor.quantization_config.format) and overall is not None:
            codes = unpack_fp4_from_uint8(tensors[".weight_packed"], *SHAPE, dtype=torch.float32)
            scale = tensors[".weight_scale"].float()  # decompress_model computes in bfloat16
            values = dequantize(codes, scale, args=weights, dtype=torch.float32, global_scale=overall)
        else:
            compressor.decompress_model(model)
            values = module.weight.data
        with tempfile.TemporaryDirectory() as folder:
            compressor.update_config(folder)
            config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        yield name, config, tensors | {"values": values.float()}


def _grouped(w: Tensor, weights: Any) -> Tensor:
    """The matrix with the values that share a scale in the last dimension."""
    if weights.block_structure:
        rows, columns = weights.block_structure
        return w.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).swapaxes(1, 2).flatten(2)
    return w.unflatten(-1, (-1, weights.group_size)) if weights.group_size else w[:, None]


def gptqmodel() -> Iterator[Sample]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    size = SHAPE[1]
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=size, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(3, size, (32, 64))
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    words = Tokenizer(WordLevel({"t0": 0, "t1": 1, "t2": 2, "t3": 3}, unk_token="t3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0")
    forms: dict[str, dict[str, Any]] = {
        "GPTQ, symmetric": dict(desc_act=False, sym=True),
        "GPTQ, zero points": dict(desc_act=False, sym=False),
        "AWQ, symmetric": dict(quant_method=METHOD.AWQ, format=FORMAT.GEMM, sym=True),
        "AWQ, zero points": dict(quant_method=METHOD.AWQ, format=FORMAT.GEMM, sym=False),
    }
    for name, arguments in forms.items():
        settings = QuantizeConfig(bits=4, group_size=32, offload_to_disk=False, **arguments)
        with tempfile.TemporaryDirectory() as folder:
            plain, written = f"{folder}/plain", f"{folder}/quantized"
            AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(plain)
            tokenizer.save_pretrained(plain)
            model = GPTQModel.load(plain, settings, device="cpu", dtype=torch.float16)
            model.quantize(examples, batch_size=4)
            model.save(written)
            key = "model.layers.0.self_attn.k_proj"
            tensors = load_file(f"{written}/model.safetensors")
            own = {name.removeprefix(key): tensor for name, tensor in tensors.items() if name.startswith(key)}
            if name.startswith("AWQ"):
                codes = own[".qweight"], own[".qzeros"]
                values = dequantize_gemm(*codes, own[".scales"].float(), settings.bits, settings.group_size)
            else:
                opened = GPTQModel.load(written, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
                module = opened.model.get_submodule(key)
                module.scales = module.scales.float()  # else values are rounded to float16
                values = module.dequantize_weight()
            found = json.loads(Path(f"{written}/config.json").read_text())["quantization_config"]
            del found["meta"]
        yield name, found, own | {"values": values.T.float()}


def main(library: str) -> None:
    torch.manual_seed(0)
    version = f"{library} {importlib.metadata.version(library)}"
    tensors, metadata = {}, {}
    if FILE.exists():
        with safe_open(FILE, "pt") as file:
            known = file.metadata().items()
        metadata = {name: text for name, text in known if json.loads(text)["by"].split()[0] != library}
        tensors = {key: part for key, part in load_file(FILE).items() if key.split("/")[0] in metadata}
    for name, config, parts in LIBRARIES[library]():
        metadata[name] = json.dumps({"by": version, "config": config})
        tensors |= {f"{name}/{suffix}": tensor.contiguous().clone() for suffix, tensor in parts.items()}
        print(name, {suffix: (tuple(t.shape), t.dtype) for suffix, t in parts.items()})
    save_file(tensors, FILE, metadata)


LIBRARIES = {"compressed-tensors": compressed_tensors, "gptqmodel": gptqmodel}

if __name__ == "__main__":
    main(sys.argv[1])
