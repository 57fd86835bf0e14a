"""Checkpoints to read from: a network, a state dict, a safetensors file, a folder of shards. Headers first, values on demand."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .layout_sane import TensorLayout, TensorSpec

SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"


class CheckpointFiles:
    """The tensors of a state dict, a safetensors file or a folder of shards, read one piece at a time.

    Args:
        source (`Mapping`, `str` or `Path`): a state dict, a `.safetensors` file, or a folder that holds one or several with
            their index.

    Raises:
        ValueError: If there is no such file, it is no safetensors file, or a shard is missing.
    """

    def __init__(self, source: Any):
        self._tensors = source if isinstance(source, Mapping) else None
        self._handles: dict[str, Any] = {}
        if self._tensors is not None:
            self.specs, self.ties = state_dict_specs(source)
            return
        self.specs, self.ties = [], {}
        for file in _safetensors_files(Path(source)):
            try:
                handle = safe_open(file, framework="pt")
            except Exception as error:  # safetensors raises its own type, and OSError for an unreadable file
                raise ValueError(f"{file} is no valid safetensors file: {error}.") from error
            for name in handle.keys():  # noqa: SIM118 (a handle is not iterable)
                if name in self._handles:
                    raise ValueError(f"{name} stands in two files of {source}; keep one.")
                self._handles[name] = handle
                piece = handle.get_slice(name)
                self.specs.append(TensorSpec(name, tuple(piece.get_shape()), _DTYPES[piece.get_dtype()]))
            self.ties |= {k: v for k, v in (handle.metadata() or {}).items() if k != "format"}
        self.specs.sort(
            key=lambda spec: _natural(spec.name)
        )  # files are sorted by dtype and text: layer10 before layer2
        self.ties = {k: v for k, v in self.ties.items() if v in self._handles and k not in self._handles}

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(self, *_: Any) -> None:
        self._handles.clear()

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors."""
        if self._tensors is not None:
            return dict(self._tensors)
        return {spec.name: self._handles[spec.name].get_tensor(spec.name) for spec in self.specs}

    def rows(self, tensor: TensorLayout, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of one tensor along its row axis, as real numbers."""
        if not tensor.shape:
            piece = (
                self._tensors[tensor.name]
                if self._tensors is not None
                else self._handles[tensor.name].get_tensor(tensor.name)
            )
        else:
            index = (slice(None),) * tensor.row_axis + (slice(start, stop),)
            whole = (
                self._tensors[tensor.name]
                if self._tensors is not None
                else self._handles[tensor.name].get_slice(tensor.name)
            )
            piece = whole[index]
        return torch.view_as_real(piece) if piece.is_complex() else piece


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32",
    "U64": "uint64", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


def _natural(name: str) -> list:
    """Sort key that puts layer2 before layer10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _safetensors_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file; convert it with safetensors.torch.save_file first.")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a state dict, a .safetensors file or a folder that holds one.")
    index = path / SAFETENSORS_INDEX_NAME
    if index.exists():
        files = [
            path / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{index} names {missing[0]}, which is not there; download the checkpoint again.")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no .safetensors file.")
    return files


def read_checkpoint(source: Any) -> Mapping[str, torch.Tensor]:
    """All tensors of a source, without copying those in memory."""
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    with CheckpointFiles(source) as files:
        tensors = files.read()
        return tensors | {name: tensors[kept] for name, kept in files.ties.items()}


def _spec(name: str, tensor: torch.Tensor, kind: str | None = None, row_axis: int | None = None) -> TensorSpec:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, a state dict holds tensors; give the inner state dict itself."
        )
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), kind, row_axis)


def state_dict_specs(
    tensors: Mapping[str, torch.Tensor], types: Mapping | None = None
) -> tuple[list[TensorSpec], dict]:
    """Specs of a state dict, and its ties: names whose tensor is the very same piece of memory as an earlier one."""
    specs, ties, seen = [], {}, {}
    for name, tensor in tensors.items():
        spec = _spec(name, tensor, *(types or {}).get(name, ()))
        # neighbours in one flat buffer differ in their address; tensors without memory (meta) are told apart by identity
        if tensor.numel() and tensor.device.type != "meta":
            key = (tensor.device, tensor.data_ptr(), spec.shape, tensor.stride(), tensor.dtype)
        else:
            key = id(tensor)
        if key in seen:
            ties[name] = seen[key]
        else:
            seen[key] = name
            specs.append(spec)
    return specs, ties


def module_specs(module: nn.Module) -> tuple[list[TensorSpec], dict]:
    """As [`state_dict_specs`], with the layer kinds and row axes that the types of the modules tell."""
    types = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        kind, row_axis = _module_type(child)
        if kind is not None:
            for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
                axis = row_axis if tensor.dim() >= 2 else None
                types[f"{prefix}.{name}" if prefix else name] = (kind, axis)
    return state_dict_specs(module.state_dict(keep_vars=True), types)


def _module_type(module: nn.Module) -> tuple[str | None, int | None]:
    """Layer kind and row axis that a module's type implies; (None, None) leaves them to the shapes."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "conv", 1 if module.groups == 1 else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv", 0
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.MultiheadAttention)):
        return "linear", 0
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': a Linear stored as (in, out)
        return "linear", 1
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return "norm", None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", 0
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent", 0
    return None, None
