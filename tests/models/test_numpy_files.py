"""Folders of numpy files, converted from OPT checkpoints by FlexGen 0.1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexgen.errors import CheckpointError, ModelError
from flexgen.models import build_layers, open_model
from flexgen.models.headers import StoredTensor, read_numpy_header
from flexgen.models.tensor_files import NumpyCheckpoint


@pytest.fixture
def folder(tmp_path):
    """`folder(model)`: its directory."""

    def write(model, name="mine-np"):
        directory = tmp_path / name
        directory.mkdir()
        for key, tensor in model.state_dict().items():
            key = key.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm")
            with open(directory / key, "wb") as file:
                np.save(file, tensor.numpy())
        return directory

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_tensor_is_read_in_place(dtype, make_model, folder):
    model = make_model("opt", dtype=dtype)
    spec, checkpoint = open_model(model.config, weights=folder(model))
    assert isinstance(checkpoint, NumpyCheckpoint)
    assert spec.dtype == dtype and spec.tied_head
    layers = build_layers(spec)
    checkpoint.verify(layers)
    tensors = model.state_dict()
    for weight in (weight for layer in layers for weight in layer.weights):
        extent = checkpoint.extent(weight)
        data = bytearray(extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes])
        assert torch.equal(torch.frombuffer(data, dtype=extent.dtype).view(extent.shape), tensors[weight.key])
        assert torch.equal(checkpoint.read(weight, dtype), tensors[weight.key])


def test_the_files_tell_the_dtype_where_the_config_does_not(make_model, folder):
    model = make_model("opt", dtype=torch.float16)
    model.config.dtype = None
    assert open_model(model.config, weights=folder(model))[0].dtype == torch.float16


def test_a_folder_of_a_known_name_needs_no_configuration(make_model, folder):
    directory = folder(make_model("opt"), "opt-125m-np")
    spec, checkpoint = open_model(directory)
    assert (spec.num_layers, spec.hidden_size) == (12, 768)
    with pytest.raises(CheckpointError, match="tensors missing"):  # it holds a smaller model
        checkpoint.verify(build_layers(spec))
    with pytest.raises(ModelError, match="no config.json"):
        open_model(directory.rename(directory.with_name("other-np")))


def test_weights_of_another_directory_for_any_configuration(make_model, save):
    model = make_model("llama")
    directory = save(model)
    spec, checkpoint = open_model(model.config, weights=directory)
    checkpoint.verify(build_layers(spec))
    with pytest.raises(CheckpointError, match="elsewhere: there is no such directory"):
        open_model(model.config, weights=directory / "elsewhere")
    (directory / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors.*decoder\.embed_tokens"):
        open_model(model.config, weights=directory / "empty")
    with pytest.raises(ModelError, match="a Path of a directory"):
        open_model(model.config, weights=str(directory))


def test_damage_is_named(make_model, folder):
    directory = folder(make_model("opt"))
    path = directory / "decoder.layers.0.fc1.weight"
    whole = path.read_bytes()
    assert isinstance(read_numpy_header(path), StoredTensor)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"fc1\.weight.*truncated"):
        NumpyCheckpoint(directory)
    path.write_bytes(b"no array")
    with pytest.raises(CheckpointError, match="not a numpy file"):
        NumpyCheckpoint(directory)
    with path.open("wb") as file:
        np.save(file, np.asfortranarray(np.ones((48, 32), np.float32)))
    with pytest.raises(CheckpointError, match="Fortran order"):
        NumpyCheckpoint(directory)


@pytest.mark.parametrize("dtype", [np.int32, ">f4", object])
def test_other_types_are_refused(dtype, make_model, folder):
    model = make_model("opt")
    directory = folder(model)
    with (directory / "decoder.layers.0.fc1.bias").open("wb") as file:
        np.save(file, np.ones(48, dtype), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"fc1\.bias"):
        spec, checkpoint = open_model(model.config, weights=directory)
        checkpoint.verify(build_layers(spec))
