"""The names of FlexGen 0.1.8 for scripts, with the order and the defaults of their arguments."""

import dataclasses
import importlib
import inspect

import pytest

from flexgen import flex_opt

EVERYWHERE = {
    "flexgen.flex_opt": "BenchmarkResult CompressionConfig DUMMY_WEIGHT ExecutionEnv GB KB MB OptConfig OptLM "
    "Policy T Task TorchDevice TorchDisk TorchMixedDevice add_parser_arguments "
    "download_opt_weights get_filename get_opt_config get_test_inputs "
    "project_decode_latency read_benchmark_log run_cmd run_flexgen str2bool timers "
    "write_benchmark_log",
    "flexgen.compression": "CompressionConfig",
    "flexgen.opt_config": "OptConfig download_opt_weights get_opt_config",
    "flexgen.pytorch_backend": "TorchDevice TorchDisk TorchMixedDevice",
    "flexgen.timer": "timers",
    "flexgen.utils": "BenchmarkResult ExecutionEnv GB KB MB T Task project_decode_latency read_benchmark_log run_cmd "
    "str2bool write_benchmark_log",
}
TAKES = {
    "OptLM": "config env path policy",
    "OptLM.generate": "self inputs max_new_tokens=32 do_sample=False temperature=1.0 stop=None debug_mode=None "
    "cut_gen_len=None verbose=0",
    "ExecutionEnv": "gpu=None cpu=None disk=None mixed=None",
    "ExecutionEnv.create": "offload_dir",
    "ExecutionEnv.close_copy_threads": "self",
    "CompressionConfig": "num_bits group_size group_dim symmetric enabled=True",
    "Task": "inputs prompt_len gen_len cut_gen_len do_sample temperature stop",
    "TorchDevice": "name mem_capacity=None flops=None",
    "TorchDevice.print_stats": "self output_file=None",
    "TorchDevice.mem_stats": "self",
    "TorchDevice.synchronize": "self",
    "TorchDisk": "path mem_capacity=None cuda_id=0 num_copy_threads=4",
    "TorchMixedDevice": "base_devices",
    "OptConfig.model_bytes": "self",
    "OptConfig.cache_bytes": "self batch_size seq_len",
    "OptConfig.hidden_bytes": "self batch_size seq_len",
    "get_test_inputs": "prompt_len num_prompts tokenizer",
    "get_filename": "args",
    "download_opt_weights": "model_name path",
    "run_flexgen": "args",
    "add_parser_arguments": "parser",
    "project_decode_latency": "costs prompt_len gen_len",
    "read_benchmark_log": "filename",
    "write_benchmark_log": "filename model_size cache_size hidden_size gpu_peak_mem projected prefill_latency "
    "prefill_throughput decode_latency decode_throughput total_latency total_throughput",
}
CONFIG = (
    "name num_hidden_layers max_seq_len hidden_size n_head input_dim ffn_embed_dim pad activation_fn vocab_size "
    "layer_norm_eps pad_token_id dtype"
)


@pytest.mark.parametrize(("module", "names"), EVERYWHERE.items())
def test_names_are_where_they_were(module, names):
    there = importlib.import_module(module)
    assert sorted(there.__all__) == sorted(set(names.split()) | ({"main"} & set(there.__all__)))
    assert all(getattr(there, name) is getattr(flex_opt, name) for name in there.__all__)


@pytest.mark.parametrize(("name", "takes"), TAKES.items())
def test_arguments_and_defaults(name, takes):
    target = flex_opt
    for part in name.split("."):
        target = getattr(target, part)
    found = inspect.signature(target).parameters.values()
    parameters = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found]
    assert " ".join(parameters) == takes


def test_a_download_says_which_command_does_it(tmp_path):
    with pytest.raises(NotImplementedError, match="hf download facebook/opt-1.3b --local-dir .*/opt-1.3b;"):
        flex_opt.download_opt_weights("facebook/opt-1.3b", str(tmp_path))


def test_fields_of_a_configuration():
    assert [field.name for field in dataclasses.fields(flex_opt.OptConfig)] == CONFIG.split()
    assert (flex_opt.GB, flex_opt.T, flex_opt.DUMMY_WEIGHT) == (1 << 30, 1e12, "_DUMMY_")


def test_an_environment_of_ones_own_devices_and_a_policy_are_plain_values(tmp_path):
    gpu, disk = flex_opt.TorchDevice("cuda:0"), flex_opt.TorchDisk(str(tmp_path / "a" / "b"))
    env = flex_opt.ExecutionEnv(gpu=gpu, disk=disk)
    assert env == flex_opt.ExecutionEnv(gpu, None, disk) and dataclasses.replace(env, gpu=None).gpu is None
    assert str(gpu) == "TorchDevice(name=cuda:0)" and (tmp_path / "a" / "b").is_dir()
    assert gpu.print_stats(str(tmp_path / "stats")) and (tmp_path / "stats").read_text().startswith(
        "TorchDevice: "
    )
