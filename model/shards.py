"""Safetensors files, read and written tensor by tensor: the only weight format of this project.

A file is 8 bytes (little-endian header length), a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes. A folder holds one such file, or several and an index (`*.safetensors.index.json` with
`weight_map`: tensor name -> file name).

Tensors are read with plain reads, not through a memory map: a load then needs the memory of one tensor, a
network file system sees long sequential reads, and a file cut short under a running program gives an error
instead of a bus fault.

Everything wrong with a file is a CheckpointError that names the file and the remedy. Pickles are refused,
never opened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from model.config import read_json
from model.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
PARTIAL_SUFFIX = ".partial"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000

DTYPE_OF_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor lies: `size_bytes` bytes from byte `start` of `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in file order, without reading their values.

    Raises CheckpointError if the file is no safetensors file, is cut short, or describes itself wrongly.
    """
    try:
        file_bytes = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            _refuse_foreign_formats(path, prefix + file.read(16))
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes):
                raise CheckpointError(
                    f"{path}: is cut short or no safetensors file ({file_bytes} bytes); get it again"
                )
            file.seek(8)
            header = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    tensors = _parse_header(path, header)
    _check_extent(path, list(tensors.values()), 8 + header_bytes, file_bytes)
    return tensors


def _refuse_foreign_formats(path: Path, start: bytes) -> None:
    """Name the two kinds of file most often found in the place of weights: pickles and git-lfs pointers."""
    if start.startswith(b"PK\x03\x04") or (
        start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[2:8] != bytes(6)
    ):
        raise CheckpointError(
            f"{path}: is a pickle under another name, which could run code when opened; "
            "get the safetensors file instead"
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` in its repository"
        )


def _parse_header(path: Path, header: bytes) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = [_tensor_info(path, name, entry, 8 + len(header)) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: has a damaged header ({error}); get the file again") from error
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.start)}


def _tensor_info(path: Path, name: str, entry: Mapping[str, object], data_start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPE_OF_CODE:
        raise ValueError(f"{name} has the type {entry['dtype']!r}, known are {', '.join(DTYPE_OF_CODE)}")
    dtype = DTYPE_OF_CODE[str(entry["dtype"])]
    shape = tuple(int(size) for size in entry["shape"])  # type: ignore[attr-defined]
    begin, end = (int(offset) for offset in entry["data_offsets"])  # type: ignore[attr-defined]
    if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name}: shape {list(shape)} of {entry['dtype']} does not fill bytes {begin} to {end}"
        )
    return TensorInfo(name, path, dtype, shape, data_start + begin, end - begin)


def _check_extent(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """The tensors must follow each other without gaps or overlaps and end where the file ends."""
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(
                f"{path}: has a damaged header ({tensor.name} overlaps or leaves a gap); get the file again"
            )
        position += tensor.size_bytes
    if position != file_bytes:
        state = "cut short" if file_bytes < position else "too long"
        raise CheckpointError(
            f"{path}: is {state}: {file_bytes} bytes, its header says {position}; get the file again"
        )


def open_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a weights folder (one file, or shards with an index), by name, without reading values.

    Raises CheckpointError listing every missing shard, every tensor that the index and the shards do not
    agree on, and pickles.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a checkpoint keeps these weights there")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        why = "a pickle could run code and is never opened; keep safetensors files only"
        raise CheckpointError(f"{folder}: holds pickles", [f"{name}: {why}" for name in pickles])
    indices = sorted(folder.glob("*" + INDEX_SUFFIX))
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: holds several indices, keep one", [path.name for path in indices])
    return _open_indexed(indices[0]) if indices else read_header(_single_file(folder))


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no *.safetensors file")
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: holds several shards but no *{INDEX_SUFFIX}", [path.name for path in files]
        )
    return files[0]


def read_index(index: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name -> file name beside it. CheckpointError if it is damaged."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; get the file again")
    strays = [
        str(file) for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file
    ]
    if strays:
        raise CheckpointError(f"{index}: names files outside its folder", sorted(set(strays)))
    return weight_map


def _open_indexed(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_index(index)
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).exists():
            problems.append(f"{file}: missing, {index.name} lists it")
            continue
        try:
            stored = read_header(index.parent / file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        named = {name for name, place in weight_map.items() if place == file}
        problems += [
            f"{name}: not in {file}, where {index.name} places it" for name in sorted(named - stored.keys())
        ]
        problems += [
            f"{name}: in {file}, but {index.name} does not place it there"
            for name in sorted(stored.keys() - named)
        ]
        tensors |= stored
    if problems:
        raise CheckpointError(f"{index.parent}: unusable shards", problems)
    return tensors


def iter_tensors(infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, Tensor]]:
    """Read tensors one at a time in file order: (where it was, values in host memory with the stored type).

    All share one buffer: a tensor's values are gone when the next one is asked for. Each file is opened once.
    Raises CheckpointError if a file ends before a tensor does.
    """
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        by_file.setdefault(info.path, []).append(info)
    # A buffer for each tensor, freed after the cast, leaves holes between the weights that stay: twice the
    # memory.
    largest = max((info.size_bytes for stored in by_file.values() for info in stored), default=0)
    buffer = torch.empty(largest, dtype=torch.uint8)
    for path in sorted(by_file):
        try:
            with open(path, "rb", buffering=0) as file:
                for info in sorted(by_file[path], key=lambda info: info.start):
                    yield info, _read(file, info, buffer[: info.size_bytes])
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _read(file: BinaryIO, info: TensorInfo, buffer: Tensor) -> Tensor:
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    file.seek(info.start)
    done = 0
    while done < info.size_bytes:
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{info.path}: ends inside {info.name}; get the file again")
        done += count
    return buffer.view(info.dtype).reshape(info.shape)


class ShardWriter:
    """Writes one safetensors file whose tensors arrive one by one, in any order, with the memory of one
    tensor.

    `layout`: name -> (type, shape) of every tensor to come. The file appears under `path` only on a clean
    exit from the context, complete and flushed to the disk; until then the bytes are in `path` + ".partial",
    which a failure removes.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        # Wide types first keeps every tensor aligned to its element size, which other readers rely on.
        names = sorted(layout, key=lambda name: -layout[name][0].itemsize)
        entries: dict[str, dict[str, object]] = {}
        position = 0
        for name in names:
            dtype, shape = layout[name]
            end = position + math.prod(shape) * dtype.itemsize
            entries[name] = {
                "dtype": CODE_OF_DTYPE[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._expected = dict(layout)
        self._start = {name: 8 + len(header) + entries[name]["data_offsets"][0] for name in names}  # type: ignore[index]
        self._prefix = struct.pack("<Q", len(header)) + header

    def __enter__(self) -> ShardWriter:
        self._file = open(self._partial, "wb")
        self._file.write(self._prefix)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor; its type and shape must be those of the layout (ValueError otherwise)."""
        dtype, shape = self._expected.pop(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: got {tensor.dtype} {list(tensor.shape)}, the layout says {dtype} {list(shape)}"
            )
        self._file.seek(self._start[name])
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    flush_to_disk(self._file)
            if kind is None and self._expected:
                raise ValueError(f"{self.path}: never written: {', '.join(sorted(self._expected))}")
            if kind is None:
                commit(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def flush_to_disk(file: BinaryIO) -> None:
    """Push a file's bytes through all buffers to the device."""
    file.flush()
    os.fsync(file.fileno())


def commit(partial: Path, path: Path) -> None:
    """Give a finished file its name, so that a crash leaves either the old state or the new one."""
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small file with the same guarantees as a shard."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with open(partial, "wb") as file:
        file.write(text.encode())
        flush_to_disk(file)
    commit(partial, path)
