"""`OptLM` of 0.1: its results, its output and its end."""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import flexgen
from flexgen.errors import RequestError
from flexgen.flex_opt import ExecutionEnv, OptLM, TorchDevice, TorchDisk, TorchMixedDevice
from flexgen.flex_opt.model import cost_lines
from flexgen.results.trace import Event, LaneName
from flexgen.schedule.steps import Op, Step

PAD = 1
PROMPTS = [[PAD, PAD, 5, 6], [7, 8, 9, 10], [PAD, 11, 12, 13], [14, 15, 16, 17], [PAD, PAD, PAD, 18]]


@pytest.fixture
def model(tiny, env, policy):
    return OptLM(tiny.config, env, str(tiny.path), policy(0, 50, 50, 50, 0, 100, num_gpu_batches=2))


def test_prompts_need_not_fill_the_batches(model, tiny):
    out = model.generate(np.array(PROMPTS), max_new_tokens=8)
    assert out.dtype == np.int32 and out.shape == (5, 12)
    np.testing.assert_array_equal(out, tiny.greedy(PROMPTS, 8))
    np.testing.assert_array_equal(model.generate(tuple(PROMPTS[:1]), max_new_tokens=8), out[:1])
    np.testing.assert_array_equal(model.generate(torch.tensor(PROMPTS), max_new_tokens=8), out)


def test_equals_the_new_interface(model, tiny):
    with flexgen.OptLM(tiny.hf / "opt-tiny", model.policy.to_policy(), device="cpu") as new:
        expected = new.generate(PROMPTS, 8, stop=())
    np.testing.assert_array_equal(model.generate(PROMPTS, 8), expected)


@pytest.mark.parametrize(
    "changes",
    [
        dict(cpu_cache_compute=True),
        dict(cpu_cache_compute=True, overlap=False, sep_layer=False),
        dict(attn_sparsity=1.0, act_gpu_percent=30, act_cpu_percent=30),
    ],
)
def test_three_tiers_on_a_device_of_its_own(changes, tiny, policy, tmp_path):
    gpu, cpu, disk = TorchDevice("emulated"), TorchDevice("cpu"), TorchDisk(str(tmp_path / "offload"))
    env = ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=TorchMixedDevice([gpu, cpu, disk]))
    mixed = policy(30, 30, 30, 30, 0, 100, num_gpu_batches=2, **changes)
    out = OptLM(tiny.config, env, str(tiny.path), mixed).generate(PROMPTS, 6)
    np.testing.assert_array_equal(out, tiny.greedy(PROMPTS, 6))
    env.close_copy_threads()


def test_compressed_weights_and_cache_run_and_differ(tiny, env, policy):
    plain, packed = (
        OptLM(tiny.config, env, str(tiny.path), policy(compress_weight=on, compress_cache=on))
        for on in (False, True)
    )
    assert plain.engine.placement.nbytes != packed.engine.placement.nbytes
    out = packed.generate(PROMPTS, 6)
    assert out.shape == (5, 10) and (out[:, :4] == PROMPTS).all()


def test_only_the_stop_id_stops(model, tiny):
    free = model.generate(PROMPTS, 12)
    np.testing.assert_array_equal(free, tiny.greedy(PROMPTS, 12))
    for never in (
        0,
        "\n",
        "",
    ):  # as in 0.1: 0 is no stop, and a text, which one of its scripts gives, is no id
        np.testing.assert_array_equal(model.generate(PROMPTS, 12, stop=never), free)
    stop = int(free[1, 6])
    np.testing.assert_array_equal(model.generate(PROMPTS, 12, stop=stop), tiny.greedy(PROMPTS, 12, stop))


def test_rows_of_padding_fill_a_block_and_are_not_computed(model, tiny):
    filled = [*PROMPTS[:3], [PAD] * 4]
    out = model.generate(np.array(filled), 5)
    np.testing.assert_array_equal(out[:3], tiny.greedy(PROMPTS[:3], 5))
    assert (out[3] == PAD).all()
    assert model.stats.num_prompts == 3
    assert (model.generate([[PAD, PAD]], 3) == PAD).all()
    wide = model.generate([[PAD] * 4, [5, 6]], 3)
    np.testing.assert_array_equal(wide[1:], tiny.greedy([[PAD, PAD, 5, 6]], 3))


def test_rows_may_be_tensors(model, tiny):
    expected = tiny.greedy(PROMPTS, 5)
    np.testing.assert_array_equal(model.generate([torch.tensor(row) for row in PROMPTS], 5), expected)
    np.testing.assert_array_equal(
        model.generate([torch.tensor([PAD, PAD]), torch.tensor([7])], 1)[0], [PAD] * 3
    )


def test_padding_is_not_computed_in_lists_of_any_lengths(model, tiny):
    out = model.generate([[PAD, PAD, 5, 6], [7, 8], [PAD, 9]], 6)
    assert model.stats.prompt_tokens == 5
    np.testing.assert_array_equal(
        out, tiny.greedy([[PAD, PAD, 5, 6], [PAD, PAD, 7, 8], [PAD, PAD, PAD, 9]], 6)
    )


def test_sampling_follows_torchs_seed(model):
    def drawn(seed):
        torch.manual_seed(seed)
        return model.generate(PROMPTS, 8, do_sample=True, temperature=2.0)

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert (drawn(0) != drawn(1)).any()
    np.testing.assert_array_equal(
        model.generate(PROMPTS, 8, do_sample=True, temperature=1e-7), model.generate(PROMPTS, 8)
    )
    np.testing.assert_array_equal(
        model.generate(PROMPTS, 8, do_sample=True, temperature=0.0), model.generate(PROMPTS, 8)
    )


def test_cut_gen_len_and_fewer_batch_run_a_few_tokens(model, capsys):
    whole = model.generate(PROMPTS, 12)
    for options, tokens in ((dict(cut_gen_len=3), 3), (dict(debug_mode="fewer_batch"), 4)):
        out = model.generate(PROMPTS, 12, **options)
        np.testing.assert_array_equal(out[:, : 4 + tokens], whole[:, : 4 + tokens])
        assert (out[:, 4 + tokens :] == PAD).all()
    assert "projected from 4 tokens" in capsys.readouterr().err
    np.testing.assert_array_equal(model.generate(PROMPTS, 12, cut_gen_len=0), whole)


def test_breakdown_prints_the_table_of_costs(tiny, env, policy, capsys):
    split = policy(0, 0, 0, 0, 0, 0, num_gpu_batches=2)
    OptLM(tiny.config, env, str(tiny.path), split).generate(PROMPTS[:4], 12, debug_mode="breakdown")
    out = capsys.readouterr().out
    counts = dict(re.findall(r"^#(\w+(?: \w+)?): +(\d+)$", out, re.M))
    assert counts == {"layers": "6", "batches prefill": "12", "batches decoding": str(11 * 12)}
    costs = {
        name: float(s) for name, s in re.findall(r"^(\w+) +\(per-(?:layer|batch)\): ([\d.]+) s$", out, re.M)
    }
    assert list(costs) == [
        "load_weight",
        *(f"{what}_{stage}" for stage in ("prefill", "decoding") for what in (
            "load_cache", "store_cache", "compute_layer",
        )),
    ]  # fmt: skip
    assert costs["load_cache_prefill"] == 0, "a prefill has no cache to load"


def test_costs_are_means_of_all_layers_and_batches():
    def event(op, token, layer, batch, seconds):
        return Event(Step(op, token, layer, batch), LaneName.COMPUTE, 10.0, 10.0 + seconds)

    # Two layers, three batches in two blocks; the prefill and two later tokens.
    events = [
        event(Op.LOAD_WEIGHTS, 0, 0, 0, 3.0),
        event(Op.LOAD_WEIGHTS, 2, 1, 1, 9.0),  # 12 s for 2 layers, 2 blocks, 3 tokens
        event(Op.COMPUTE, 0, 1, 2, 6.0),  # for 2 layers, 3 batches
        event(Op.COMPUTE, 1, 0, 0, 1.0),
        event(Op.COMPUTE, 2, 1, 0, 2.0),  # 3 s for 2 layers, 3 batches, 2 tokens
        event(Op.LOAD_CACHE, 1, 1, 0, 6.0),
    ]
    lines = cost_lines(events, layers=2, batches=3, blocks=2, gen_len=32)
    assert lines == [
        "#layers: 2",
        "#batches prefill:  6",
        "#batches decoding: 186",
        "load_weight            (per-layer): 1.000000 s",
        "load_cache_prefill     (per-batch): 0.000000 s",
        "store_cache_prefill    (per-batch): 0.000000 s",
        "compute_layer_prefill  (per-batch): 1.000000 s",
        "load_cache_decoding    (per-batch): 0.500000 s",
        "store_cache_decoding   (per-batch): 0.000000 s",
        "compute_layer_decoding (per-batch): 0.250000 s",
    ]
    assert len(cost_lines(events[:1], 2, 3, 2, gen_len=1)) == 7, "without a decode there is no table of it"


def test_a_task_has_the_arguments(model):
    model.generate(PROMPTS, 2, temperature=0.5, stop=9)
    task = model.task
    assert (task.prompt_len, task.gen_len, task.cut_gen_len, task.stop) == (4, 2, None, 9)
    assert (task.do_sample, task.temperature, task.inputs) == (False, 0.5, PROMPTS)


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        ([], {}, "no prompts"),
        ([[]], {}, "prompt 0 is empty"),
        (5, {}, "prompts are a int"),
        (BatchEncoding({"input_ids": [[5, 6]]}), {}, "prompts are a BatchEncoding.* input_ids"),
        ({"input_ids": [[PAD, 5]]}, {}, "prompts are a dict"),
        ((row for row in [[5, 6]]), {}, "prompts are a generator"),
        ([PAD, PAD], {}, "wrap one prompt"),
        (torch.ones(1, 2, dtype=torch.bfloat16), {}, "whole numbers"),
        ([[5, 96]], {}, "has id 96"),
        ([[5]], {"debug_mode": "profile"}, "debug_mode is 'profile'"),
        ([[5]], {"max_new_tokens": 64}, "64 positions"),
        ([[5]], {"stop": 96}, "stop id 96"),
    ],
)
def test_invalid_arguments_are_refused(model, inputs, options, said):
    with pytest.raises(RequestError, match=said):
        model.generate(inputs, **options)


def test_closing_the_environment_closes_its_models(tiny, tmp_path, policy):
    env = ExecutionEnv.create(str(tmp_path / "offload"))
    assert (tmp_path / "offload").is_dir()
    models = [OptLM(tiny.config, env, str(tiny.path), policy(0, 0, 0, 0, 0, 0)) for _ in range(2)]
    models[0].generate(PROMPTS, 2)
    env.close_copy_threads()
    env.close_copy_threads()
    for model in models:
        with pytest.raises(RequestError, match="closed"):
            model.generate(PROMPTS, 2)
    assert not list((tmp_path / "offload").glob("flexgen-run-*"))


def test_a_dropped_model_frees_its_resources(tiny, env, policy, tmp_path):
    model = OptLM(tiny.config, env, str(tiny.path), policy(0, 0, 0, 0, 0, 0))
    engine, folder = weakref.ref(model.engine), tmp_path / "offload"
    model.generate(PROMPTS, 2)
    assert list(folder.glob("flexgen-run-*"))
    del model
    gc.collect()
    assert engine() is None and not list(folder.glob("flexgen-run-*"))


def test_without_cuda_the_cpu_stands_for_the_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    env = ExecutionEnv.create(str(tmp_path))
    assert (env.gpu.name, env.cpu.name, env.disk.path) == ("cpu", "cpu", str(tmp_path))
    gpu = TorchDevice("cuda:0")
    assert (gpu.name, gpu.dev) == ("cuda:0", torch.device("cpu"))
    now, peak = gpu.print_stats()
    assert 0 < now <= peak * 1.5
    assert re.fullmatch(
        r"TorchDevice: cuda:0\n  cur_mem: \d+\.\d{4} GB,  peak_mem: \d+\.\d{4} GB\n", capsys.readouterr().out
    )


def test_an_environment_may_be_empty(tiny, policy):
    env = ExecutionEnv()
    out = OptLM(tiny.config, env, str(tiny.path), policy(100, 0, 0, 0)).generate(PROMPTS, 2)
    np.testing.assert_array_equal(out, tiny.greedy(PROMPTS, 2))
    env.close_copy_threads()


def test_rows_of_padding_do_not_change_the_draws_of_others(model):
    def drawn(rows):
        torch.manual_seed(0)
        return model.generate(rows, 8, do_sample=True, temperature=2.0)

    filled = [PROMPTS[0], [PAD] * len(PROMPTS[1]), *PROMPTS[2:4]]
    np.testing.assert_array_equal(drawn(filled)[[0, 2, 3]], drawn(PROMPTS[:4])[[0, 2, 3]])
