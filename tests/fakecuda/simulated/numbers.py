"""What the kernels of the simulated GPU would have written.

Its memory is host memory, so torch's CPU kernels compute each operation once more on the same bytes. Copies between
host and device are the simulated runtime's own: what is downloaded is there only when the host has waited for it.
Operations take effect in the order of their issue; `races` looks for what another order would change. An operation
that a CUDA graph captures takes effect at each launch of the graph, on the memory that it was captured with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from simulated import runtime

_CPU = torch.device("cpu")
_NO_KERNEL = frozenset(
    "empty empty_like new_empty empty_strided new_empty_strided record_stream is_pinned _pin_memory set_ resize_ "
    "item _local_scalar_dense".split()
)
"""Operations that write nothing, or that read what earlier ones have written."""


def in_host_memory(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a tensor on the simulated GPU."""
    storage = tensor.untyped_storage()
    if not storage.nbytes() or not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    octets = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(octets, dtype=torch.uint8)
    whole = storage.nbytes() // tensor.dtype.itemsize * tensor.dtype.itemsize
    elements = flat[:whole].view(tensor.dtype)
    return elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _there(value: Any) -> Any:
    if isinstance(value, Tensor):
        return in_host_memory(value) if value.is_cuda else value
    if isinstance(value, torch.Generator):
        return None
    return _CPU if isinstance(value, torch.device) else value


def _on_gpu(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.is_cuda) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, scale: float | None = None
) -> tuple[Tensor | None, ...]:
    """The results that the CPU's kernel has too: the attention and its log-sum-exp."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return (*on_cpu(q, k, v, dropout, causal, scale=scale), *[None] * 7)


_FOR_GPU_ONLY = {torch.ops.aten._scaled_dot_product_flash_attention.default: _flash_attention}


class Numbers(TorchDispatchMode):
    """Right numbers from a simulated GPU, in the thread that enters it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = pytree.tree_leaves((args, kwargs))
        if not any(map(_on_gpu, given)):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "copy_":
            return _copy(func, args, kwargs)
        if name == "_to_copy" and _crosses(args[0], kwargs):
            return _to_copy(func, args, kwargs)
        result = func(*args, **kwargs)
        if name in _NO_KERNEL or _is_view(func, given, result):
            return result
        there, options = pytree.tree_map(_there, args), pytree.tree_map(_there, kwargs)
        on_cpu = _FOR_GPU_ONLY.get(func, func)
        own = {id(value) for value in given}
        # What was given, such as an `out=`, is written by the second run.
        targets = [
            _there(made) if isinstance(made, Tensor) and made.numel() and id(made) not in own else None
            for made in pytree.tree_leaves(result)
        ]

        def compute() -> None:
            for target, made in zip(targets, pytree.tree_leaves(on_cpu(*there, **options)), strict=True):
                if target is not None and made is not None:
                    target.copy_(made)

        _now_or_in_graph(compute)
        return result


def _now_or_in_graph(compute: Callable[[], object]) -> None:
    if runtime.capturing():
        runtime.at_each_launch(compute)
    else:
        compute()


def _is_view(func: Any, given: list[Any], result: Any) -> bool:
    """Whether the result is a view of what was given; `reshape` and its like may also copy."""
    returns = func._schema.returns
    if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return False
    storages = {value.untyped_storage().data_ptr() for value in given if isinstance(value, Tensor)}
    made = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
    return all(value.untyped_storage().data_ptr() in storages for value in made)


def _crosses(source: Tensor, kwargs: Any) -> bool:
    target = kwargs.get("device")
    return target is not None and torch.device(target).type != source.device.type


def _copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`copy_`. Where the runtime would copy what a kernel has converted or gathered first, that is computed here."""
    target, source = args[0], args[1]
    if target.is_cuda and source.is_cuda:
        _now_or_in_graph(partial(in_host_memory(target).copy_, in_host_memory(source)))
        return func(*args, **kwargs)
    raw = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    if raw and target.shape == source.shape:
        return func(*args, **kwargs)
    if target.is_cuda:
        func(*args, **kwargs)
        in_host_memory(target).copy_(source)
        return target
    staged = torch.empty(target.shape, dtype=target.dtype, device=source.device)
    in_host_memory(staged).copy_(in_host_memory(source))
    if target.is_contiguous():
        return func(target, staged, *args[2:], **kwargs)
    func(*args, **kwargs)  # blocks: torch downloads to a buffer of its own
    return target.copy_(in_host_memory(source))


def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    source = args[0]
    if source.is_cuda:
        dtype = kwargs.get("dtype") or source.dtype
        staged = torch.empty_like(source, dtype=dtype, memory_format=torch.contiguous_format)
        in_host_memory(staged).copy_(in_host_memory(source))
        return func(staged, *args[1:], **kwargs)
    result = func(*args, **kwargs)
    in_host_memory(result).copy_(source)
    return result
