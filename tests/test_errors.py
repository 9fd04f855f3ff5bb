"""Values of any size, depth and type are shown in few characters, and each error has its class."""

import datetime
import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexgen import OptLM, flex_opt
from flexgen.cli.flags import count
from flexgen.errors import (
    MOST_CHARACTERS,
    MOST_OF_PATH,
    FlexGenError,
    HardwareError,
    PolicyError,
    RequestError,
    did_you_mean,
    shown,
    shown_path,
)
from flexgen.layout.limits import read_limits
from flexgen.memory.gpu import open_device
from flexgen.policy import Auto, Policy
from flexgen.predict.hardware import Hardware
from flexgen.schedule.orders import ORDERS
from flexgen.units import LARGEST_COUNT, parse_bytes
from flexgen.workload import Workload

MOST_OF_A_MESSAGE = 2000
HUGE = 1 << 40_000  # 12,042 digits: Python writes no more than 4300


def nested(depth):
    table = {}
    for _ in range(depth):
        table = {"a": table}
    return table


DEEP = nested(5000)


class Failing:
    def __repr__(self):
        raise RuntimeError("no text")

    __str__ = __repr__


class Impostor:
    """reprlib chooses by the name of the type."""


Impostor.__name__ = "list"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (-(10**20), "-100000000000000000000"),
        (HUGE, "about 2**40000"),
        (-HUGE, "about -2**40000"),
        ([HUGE, True, None], "[about 2**40000, True, None]"),
        ({"gpu": 20, "cpu": [1.5]}, "{'gpu': 20, 'cpu': [1.5]}"),
        ({1: {2: {3: {4: {5: 6}}}}}, "{1: {2: {3: {4: {...}}}}}"),
        ("a\n\ud800'", '"a\\n\\ud800\'"'),
        (Failing(), "<Failing>"),
        (Impostor(), "<list>"),
        (Fraction(HUGE), "<Fraction>"),
        (range(9), "range(0, 9)"),
    ],
    ids=lambda part: part if isinstance(part, str) and part.isprintable() else "",
)
def test_a_value_is_shown_as_python_writes_it_where_that_is_short(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    "value",
    [DEEP, [DEEP] * 1000, "x" * 10**6, ["x" * 10**6] * 10**4, dict.fromkeys(map(str, range(10**5)), HUGE)]
    + [b"x" * 10**6, torch.zeros(1000, 1000), np.zeros((1000, 1000)), Impostor(), [Failing()] * 100],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_in_few_characters(value):
    assert 0 < len(shown(value)) <= MOST_CHARACTERS + len("...")


# By name, since hypothesis writes down what it samples from, and Python refuses to write some of these.
EXTREMES = {
    "huge": HUGE,
    "-huge": -HUGE,
    "fraction": Fraction(HUGE),
    "long": "x" * 10**5,
    "digits": "1" * 10**4,
    "deep": DEEP,
    "wide": [DEEP] * 100,
    "failing": Failing(),
    "impostor": Impostor(),
    "date": datetime.date(2026, 1, 1),
}
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([LARGEST_COUNT, LARGEST_COUNT + 1, 0, -1]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["1e400", "cpu", "int4", "\ud800", "10GiB"]),
    st.sampled_from(sorted(EXTREMES)).map(lambda name: EXTREMES[name]),
)
LONG = st.sampled_from(["huge", "long"]).map(lambda name: EXTREMES[name])
KEYS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["gpu", "cpu", "disk", "percent", "codec", "float32", None]),
    LONG,
)
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)


def refused_in_few_characters(call, *errors):
    """Whether `call` raised one of `errors`, with a short message; anything else that it raises passes through."""
    try:
        call()
    except errors as error:
        assert 0 < len(str(error)) <= MOST_OF_A_MESSAGE
        return True
    return False


POLICY = Policy().to_dict()
FLEX_OPT = flex_opt.Policy(1, 1, *(100, 0) * 3, *(True,) * 4, 1.0, False, None, False, None)


@pytest.mark.parametrize("name", POLICY)
def test_deeply_nested_values_of_a_policy_are_refused(name):
    for value in (DEEP, {"gpu": DEEP}, {"gpu": {"percent": 100, "codec": DEEP}}, [DEEP]):
        for make in (Policy.from_dict, Auto, lambda fields: Policy().replace(**fields)):
            assert refused_in_few_characters(partial(make, {name: value}), PolicyError)


@pytest.mark.parametrize("name", ["gpu_batch_size", "w_gpu_percent", "act_cpu_percent", "attn_sparsity"])
def test_deeply_nested_values_of_a_policy_of_flexgen_0_1_are_refused(name):
    fields = vars(FLEX_OPT) | {name: DEEP}
    assert refused_in_few_characters(lambda: flex_opt.Policy(**fields), PolicyError)


@given(st.sampled_from([*POLICY, "x"]) | KEYS, VALUES)
@example("attend_on", [HUGE])
@example("weights", {"cpu": {"percent": 100, "codec": HUGE}})
@example("weights", [HUGE])
@example("gpu_batch_size", HUGE)
@example("gpu_batch_size", -HUGE)
def test_any_value_of_a_policy_is_taken_or_refused(key, value):
    refused_in_few_characters(lambda: Policy.from_dict({key: value}), PolicyError)
    refused_in_few_characters(lambda: Policy.from_dict(value), PolicyError)
    refused_in_few_characters(lambda: Auto({key: value}), PolicyError)
    refused_in_few_characters(lambda: Policy.from_percent(value, 0, 100, value, 0, 100), PolicyError)
    if isinstance(key, str):
        refused_in_few_characters(lambda: Policy().replace(**{key: value}), PolicyError)


@given(st.sampled_from(sorted(vars(FLEX_OPT))), VALUES)
@example("w_gpu_percent", HUGE)
def test_any_value_of_a_policy_of_flexgen_0_1_is_taken_or_refused(name, value):
    fields = vars(FLEX_OPT) | {name: value}
    refused_in_few_characters(lambda: flex_opt.Policy(**fields), PolicyError)
    fields |= {"compress_weight": True, "comp_weight_config": value}
    refused_in_few_characters(lambda: flex_opt.Policy(**fields), PolicyError)
    fields["comp_weight_config"] = flex_opt.CompressionConfig(value, value, value, False)
    assert refused_in_few_characters(lambda: flex_opt.Policy(**fields), PolicyError)


@given(st.sampled_from(["prompt_len", "gen_len", "num_prompts"]), VALUES)
@example("gen_len", -HUGE)
@example("gen_len", HUGE)
def test_any_value_of_a_workload_is_taken_or_refused(name, value):
    fields = dict.fromkeys(("prompt_len", "gen_len", "num_prompts"), 1) | {name: value}
    refused = refused_in_few_characters(lambda: Workload(**fields), RequestError)
    assert refused != (type(value) is int and 1 <= value <= LARGEST_COUNT)


MACHINE = Hardware.preset("t4").to_dict()
TABLES = [name for name, value in MACHINE.items() if isinstance(value, dict)]


@given(st.sampled_from([*MACHINE, "x"]) | KEYS, st.sampled_from(TABLES), KEYS, VALUES)
@example("name", "capacity", HUGE, 1)
@example("computes_in", "computes_in", "float32", ["float32"])
@example("products", "products", "float32", [[n, 1] for n in range(10_000, 0, -1)])
def test_any_value_of_a_machine_is_taken_or_refused(key, table, inner, value):
    refused_in_few_characters(lambda: Hardware.from_dict(MACHINE | {key: value}), HardwareError)
    fields = MACHINE | {table: MACHINE[table] | {inner: value}}
    refused_in_few_characters(lambda: Hardware.from_dict(fields), HardwareError)
    refused_in_few_characters(lambda: Hardware.from_dict(value), HardwareError)


def toml(value):
    """The text of a JSON value in TOML, whole numbers in hexadecimal, which has no limit of digits."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return hex(value) if whole else json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


JSON_VALUES = st.recursive(
    st.booleans()
    | st.sampled_from(["huge", "long"]).map(lambda name: EXTREMES[name])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*POLICY, *MACHINE]), JSON_VALUES)
@settings(max_examples=50)
def test_files_with_any_value_are_read_or_refused(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(f"{key} = {toml(value)}\n")
    refused_in_few_characters(lambda: Policy.load(path), PolicyError)
    assert refused_in_few_characters(lambda: Hardware.load(path), HardwareError)


@pytest.mark.parametrize("key", ["weights", "cache.gpu", "attend_on", "gpu_batch_size", "x"])
def test_dotted_keys_of_thousands_of_parts_are_refused(tmp_path, key):
    path = tmp_path / "deep.toml"
    path.write_text(f"{key}.{'.'.join('a' * 2000)} = 1\n")
    assert refused_in_few_characters(lambda: Policy.load(path), PolicyError)
    assert refused_in_few_characters(lambda: Hardware.load(path), HardwareError)


@given(VALUES, KEYS)
def test_any_limit_and_device_is_taken_or_refused(value, key):
    refused_in_few_characters(lambda: read_limits(value), RequestError)
    refused_in_few_characters(lambda: read_limits({key: value, "gpu": value}), RequestError)
    refused_in_few_characters(lambda: parse_bytes(value), ValueError)
    if not isinstance(value, str) or value.strip().lower() not in ("cpu", "auto"):
        assert refused_in_few_characters(lambda: open_device(value), FlexGenError)


def test_suggestions_take_any_word():
    assert [did_you_mean(word, ORDERS) for word in (HUGE, DEEP, None, Failing())] == [""] * 4
    assert did_you_mean("zigzga", ["zigzag"]) == " (did you mean 'zigzag'?)"


@pytest.mark.parametrize("text", ["9" * 5000, "0", "-1", "1.5", "", "x" * 5000, str(LARGEST_COUNT + 1)])
def test_numbers_on_the_command_line_are_refused_in_few_characters(text):
    with pytest.raises(Exception, match="not a whole number from 1 to 2147483647") as caught:
        count(text)
    assert len(str(caught.value)) <= MOST_OF_A_MESSAGE
    assert count(str(LARGEST_COUNT)) == LARGEST_COUNT and count("0000000012") == 12


def test_numbers_of_numpy_are_shown_as_numbers():
    assert shown(np.int64(96)) == "96" and shown(np.float32(0.5)) == "0.5" and shown([np.int8(-1)]) == "[-1]"
    assert shown(np.array(3)) == "3" and shown(np.array([3])) == "array([3])"


@pytest.mark.parametrize(
    "use",
    [
        lambda path: OptLM(path, device="cpu"),
        lambda path: OptLM("demo", device="cpu", weights=path),
        lambda path: OptLM("demo", device="cpu", offload_dir=path),
        lambda path: OptLM("demo", str(path), device="cpu"),
        Hardware.load,
    ],
    ids=["model", "weights", "offload_dir", "policy", "hardware"],
)
def test_paths_are_shown_whole_unless_no_file_can_have_them(use, tmp_path):
    with pytest.raises(FlexGenError) as raised:
        use(Path("/" + "x" * 100_000))
    assert len(str(raised.value)) < 2 * MOST_OF_PATH + 500
    missing = tmp_path / ("a" * 120) / ("b" * 120)
    assert shown_path(missing) == str(missing)
