"""From a folder of safetensors to the weights of a module, tensor by tensor.

The module is built under `torch.device("meta")`, so it has shapes and no memory. Each tensor is read, brought
to the target device, transformed (LoRAs), cast and put in place before the next one is read: beyond the
model, the host needs the memory of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.errors import CheckpointError
from model.shards import TensorInfo, iter_tensors, open_folder

# transform(name, stored tensor on the target device) -> tensor of the same shape; runs before the cast
Transform = Callable[[str, Tensor], Tensor]
# filled(path): all that a module itself holds is in place; it may be replaced by another one
Filled = Callable[[str], None]


def load_weights(
    module: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    transform: Transform | None = None,
    filled: Filled | None = None,
) -> None:
    """Fill a module built under `torch.device("meta")` from a weights folder, in place.

    Parameters become `dtype` on `device`; buffers and integer tensors keep the type that the module declares
    (int8 weights, their scales). `filled` is told each module as soon as it is whole. Raises CheckpointError
    before anything is read if names or shapes do not match, or while reading if a file ends early.
    """
    stored = open_folder(Path(folder))
    check_names(module, stored, Path(folder))
    tied = _tied_names(module)
    for info, host in iter_tensors(stored.values()):
        tensor = host.to(device)
        if transform:
            tensor = transform(info.name, tensor)
        _place(module, tied.get(info.name, [info.name]), tensor, dtype, host)
        path = info.name.rpartition(".")[0]
        if filled is not None and not any(held.is_meta for held in _own_tensors(module.get_submodule(path))):
            filled(path)
    unfilled = [name for name, tensor in _tensors(module) if tensor.is_meta]
    if unfilled:
        raise CheckpointError(
            f"{folder}: holds no values for what the network keeps outside its state dict", unfilled
        )


def check_names(module: nn.Module, stored: Mapping[str, TensorInfo], folder: Path) -> None:
    """Raise one CheckpointError listing every missing, unexpected and misshapen tensor.

    Of a tensor with several names (tied weights) one must be there.
    """
    tied = _tied_names(module)
    wanted = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name in stored or stored.keys().isdisjoint(tied.get(name, ()))
    }
    problems = [f"missing: {name} {list(wanted[name].shape)}" for name in wanted if name not in stored]
    problems += [f"unexpected: {name} {list(stored[name].shape)}" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        have, want = stored[name], wanted[name]
        if have.shape != tuple(want.shape):
            problems.append(f"wrong shape: {name} is {list(have.shape)}, wanted {list(want.shape)}")
        if have.dtype.is_floating_point != want.dtype.is_floating_point:
            problems.append(f"wrong type: {name} is {have.dtype}, wanted {want.dtype}")
    if problems:
        raise CheckpointError(
            f"{folder}: does not fit the network that its config.json describes", sorted(problems)
        )


def _tied_names(module: nn.Module) -> dict[str, list[str]]:
    """For each parameter that has several names: all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _place(
    module: nn.Module, names: Sequence[str], tensor: Tensor, dtype: torch.dtype, buffer: Tensor
) -> None:
    """Make the tensor the module's own, under each of its names."""
    owners = [
        (module.get_submodule(path), leaf) for path, _, leaf in (name.rpartition(".") for name in names)
    ]
    declared = getattr(*owners[0])
    is_parameter = isinstance(declared, nn.Parameter)
    value = tensor.to(dtype if is_parameter and tensor.is_floating_point() else declared.dtype)
    if value.data_ptr() == buffer.data_ptr():
        value = value.clone()  # nothing was converted: these bytes are the reader's own
    value = nn.Parameter(value, requires_grad=declared.requires_grad) if is_parameter else value
    for owner, leaf in owners:
        setattr(owner, leaf, value)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
