"""Nested state to one safetensors file and back, bit for bit and without pickle.

The structure (dicts with any scalar keys, lists, tuples, numbers, strings, None) is JSON in the file's metadata;
tensors are its entries. Files are written under a temporary name and renamed, so a reader sees all or nothing.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from danlu.lab.errors import StoreError

__all__ = ["load_state", "save_state", "state_bytes", "write_atomically"]

_STRUCTURE = "danlu.structure"


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`; after a crash the old file, the new one or none is there, never a part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def save_state(path: Path, state: object) -> None:
    """Save nested `state`.

    Raises:
        TypeError: the state holds something that is neither a tensor nor plain data.
        StoreError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, tensors))
    # A file of safetensors needs at least one entry only for some readers; an empty one is legal.
    write_atomically(path, save(tensors, metadata={_STRUCTURE: structure}))


def load_state(path: Path) -> object:
    """Load what `save_state` wrote.

    Raises:
        StoreError: the file cannot be read or is not one of ours.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            structure = (file.metadata() or {})[_STRUCTURE]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return _decode(json.loads(structure), tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"cannot read the saved state {path}: {error}") from error


def _encode(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # The file format has neither strides nor shared storage.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in items]}
    if isinstance(value, list):
        return {"list": [_encode(item, tensors) for item in cast("list[object]", value)]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in cast("tuple[object, ...]", value)]}
    raise TypeError(f"a state may hold tensors and plain data, not {type(value).__name__}")


def _decode(value: object, tensors: dict[str, Tensor]) -> object:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = cast("dict[str, object]", value).items()
    if kind == "tensor":
        return tensors[cast("str", content)]
    items = cast("list[object]", content)
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in cast("list[tuple[object, object]]", items)}
    decoded = [_decode(item, tensors) for item in items]
    return decoded if kind == "list" else tuple(decoded)


def state_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes held by `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
