"""Models that are known by name have the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from flexgen.models import build_layers, open_model
from flexgen.models.known import config_of, known_name, known_names, known_repository, published_format

# As published: the sum over the safetensors files of a repository, without tied heads that are stored twice, weights
# for images and layers for the prediction of several tokens. Short figures are from model cards.
# Those of OPT: tests/models/families/test_opt.py.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624, "qwen3-coder-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560, "qwen3-coder-480b-a35b": 480_154_875_392,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "qwen1.5-moe-a2.7b": 14_315_784_192, "qwen2-57b-a14b": 57.41e9,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "afm-4.5b": 4.62e9, "gpt-oss-20b": 20.91e9, "gpt-oss-120b": 116.8e9, "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400, "codestral-22b": 22_247_282_688,
    "mistral-small-24b": 23_572_403_200, "mistral-large-123b": 122_610_069_504, "ministral-3-3b": 3.4e9,
    "ministral-3-8b": 8.4e9, "ministral-3-14b": 13.5e9, "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112, "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952, "gemma-3-4b": 3.88e9, "gemma-3-12b": 11.77e9,
    "gemma-3-27b": 27.01e9, "phi-2": 2_779_683_840, "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080, "phi-4-mini": 3_836_021_760, "phi-4": 14_659_507_200,
    "glm-4-9b": 9_399_951_360, "glm-4-9b-0414": 9.4e9, "glm-4-32b-0414": 32.6e9,
    "glm-4.5-air": 106e9, "glm-4.5": 355e9, "glm-4.6": 355e9, "glm-4.7": 355e9,
    "minimax-m2": 229e9, "hy3": 295e9, "ernie-4.5-0.3b": 0.36e9,
    "ernie-4.5-21b-a3b": 21.83e9, "ernie-4.5-300b-a47b": 300e9,
    "olmo-2-1b": 1_484_916_736, "olmo-2-7b": 7_298_617_344, "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936, "olmo-3-7b": 7.3e9, "olmo-3-32b": 32.23e9, "olmoe-1b-7b": 6_919_161_856,
    "granite-3.3-2b": 2_533_531_648, "granite-3.3-8b": 8_170_848_256, "granite-3.1-1b-a400m": 1.33e9,
    "granite-3.1-3b-a800m": 3.3e9, "command-r": 34_980_831_232, "command-r-08-2024": 32_296_476_672,
    "command-r-plus": 103_810_674_688, "aya-23-8b": 8_028_033_024, "command-r7b": 8.03e9,
    "command-a": 111_057_580_032, "seed-oss-36b": 36.15e9, "exaone-4.0-32b": 32_003_216_384,
    "smollm3-3b": 3_075_098_624, "nemotron-mini-4b": 4.19e9, "nemotron-4-340b": 341e9,
    "starcoder2-3b": 3_030_371_328, "starcoder2-7b": 7_173_923_840, "starcoder2-15b": 15_957_889_024,
    "stablelm-2-1.6b": 1_644_515_328, "stablelm-2-12b": 12_143_185_920, "starcoder": 15_517_456_384,
    "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952, "falcon-180b": 178.56e9,
    "bloom-560m": 559_214_592, "bloom-7b1": 7_069_016_064, "bloom": 176_247_271_424,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "gpt-neox-20b": 20_554_567_680,
    "gpt-j-6b": 6_050_882_784, "codegen-16b": 16.03e9, "gpt2": 124_439_808, "gpt2-xl": 1_557_611_200,
    "llama-4-scout": 107.8e9, "llama-4-maverick": 400.7e9, "mimo-v2-flash": 309e9,
}  # fmt: skip


def test_every_name_is_tested() -> None:
    assert set(PARAMETERS) == {name for name in known_names() if not name.startswith("opt-")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_numbers_of_parameters(name: str) -> None:
    spec, checkpoint = open_model(name, "dummy")
    assert checkpoint.directory is None and spec.dtype is config_of(name).dtype
    unique = {weight.key: weight.numel for layer in build_layers(spec) for weight in layer.weights}
    assert sum(unique.values()) == pytest.approx(PARAMETERS[name], rel=0.011)


def test_known_models_are_in_bfloat16_unless_the_file_says_otherwise() -> None:
    assert open_model("gpt-oss-20b", "dummy")[0].dtype is torch.bfloat16
    assert open_model("llama-2-7b", "dummy")[0].dtype is torch.float16


def test_only_some_models_are_published_in_fewer_bits() -> None:
    quantized = {name: published_format(name) for name in known_names() if published_format(name)}
    assert quantized == {
        "gpt-oss-20b": "mxfp4 experts", "gpt-oss-120b": "mxfp4 experts", "minimax-m2": "fp8", "mimo-v2-flash": "fp8",
    }  # fmt: skip


def test_names_with_an_owner_and_in_capitals() -> None:
    assert known_name("Qwen/Qwen3-30B-A3B") == known_name("Qwen3-30B-A3B") == "qwen3-30b-a3b"
    assert known_name("mistralai/Mixtral-8x7B-v0.1") == "mixtral-8x7b"
    assert known_name("someone/qwen3-30b-a3b") is None and known_name("mixtral-8x8b") is None
    assert known_repository("opt-30b") == "facebook/opt-30b"
