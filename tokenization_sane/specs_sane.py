"""What the tensors of a module or state dict are: layer kinds and row axes from module types and shapes, ties from memory."""

from collections.abc import Mapping

import torch
from torch import nn

from .layout_sane import TensorSpec


def tensor_spec(name: str, tensor: torch.Tensor, kind: str | None = None, row_axis: int | None = None) -> TensorSpec:
    """Spec of one tensor; what is no dense tensor with a shape is refused by name."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}, a state dict holds tensors; give the inner state dict itself."
        )
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise ValueError(
            f"{name} has no shape yet; run the network on an input first, so that its lazy layers get theirs."
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is {tensor.layout}, a state dict holds dense tensors; call its to_dense() first.")
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), kind, row_axis)


def state_dict_specs(
    tensors: Mapping[str, torch.Tensor], types: Mapping | None = None
) -> tuple[list[TensorSpec], dict]:
    """Specs of a state dict, and its ties: names whose tensor is the very same piece of memory as an earlier one.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): the state dict.
        types (`Mapping`, *optional*): name to (kind, row axis), where more than the shape is known.
    """
    specs, ties, seen = [], {}, {}
    for name, tensor in tensors.items():
        spec = tensor_spec(name, tensor, *(types or {}).get(name, ()))
        # neighbours in one flat buffer differ in their address; tensors without memory (meta) are told apart by identity
        if tensor.numel() and tensor.device.type != "meta":
            key = (tensor.device, tensor.data_ptr(), spec.shape, tensor.stride(), tensor.dtype)
            key = (*key, tensor.is_conj(), tensor.is_neg())
        else:
            key = id(tensor)
        if key in seen:
            ties[name] = seen[key]
        else:
            seen[key] = name
            specs.append(spec)
    return with_recurrent(specs), ties


def module_specs(module: nn.Module) -> tuple[list[TensorSpec], dict]:
    """As [`state_dict_specs`], with the layer kinds and row axes that the types of the modules tell."""
    types = {}
    children = dict(module.named_modules(remove_duplicate=False))
    for prefix, child in children.items():
        typed = child
        if isinstance(child, nn.utils.parametrize.ParametrizationList):  # `x.parametrizations.weight` belongs to `x`
            typed = children[prefix.rpartition(".")[0].rpartition(".")[0]]
        named = [
            *child.named_parameters(recurse=False, remove_duplicate=False),
            *child.named_buffers(recurse=False, remove_duplicate=False),
        ]
        vectors = {len(tensor) for _, tensor in named if _dim(tensor) == 1}
        for name, tensor in named:
            types[f"{prefix}.{name}" if prefix else name] = _module_type(typed, tensor, vectors)
    return state_dict_specs(module.state_dict(keep_vars=True), types)


def _dim(tensor: torch.Tensor) -> int:
    return 0 if isinstance(tensor, nn.parameter.UninitializedTensorMixin) else tensor.dim()


def _module_type(module: nn.Module, tensor: torch.Tensor, vectors: set[int]) -> tuple[str | None, int | None]:
    """Layer kind and row axis that a module's type implies for its tensor; None leaves them to the shapes.

    Args:
        module (`nn.Module`): that holds the tensor.
        tensor (`torch.Tensor`): a parameter or buffer of it.
        vectors (`set[int]`): lengths of the 1-d tensors that stand beside it.
    """
    dim = _dim(tensor)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # stored as (in, out / groups, ...): with groups, no axis holds the output channels
        return "conv", None if dim < 2 else 1 if module.groups == 1 else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv", 0 if dim >= 2 else None
    if isinstance(module, nn.MultiheadAttention) and dim == 3:  # extra key and value: tokens, no matrices
        return "other", None
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.MultiheadAttention)):
        return "linear", 0 if dim >= 2 else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': a Linear stored as (in, out)
        return "linear", 1 if dim >= 2 else None
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return "norm", None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", 0 if dim >= 2 else None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent", 0 if dim >= 2 else None
    if dim < 2:
        return None, None  # scales, shifts and statistics of whatever it is: the shape says enough
    has_children = next(module.children(), None) is not None
    if has_children or dim > 2 or tensor.shape[0] not in vectors:
        return "other", None  # a loose parameter: class tokens, position tables
    return None, None  # a matrix with its bias, of a linear layer that torch does not know


def with_recurrent(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Mark the tables of LSTMs and GRUs, which their shapes give away where no module tells.

    All tensors of such a prefix are matrices of R rows and vectors of R, as many of each; half of the matrices (those of the
    hidden state) have R / 4 columns (LSTM) or R / 3 (GRU). Keras has one vector for two matrices.
    """
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.name.rpartition(".")[0], []).append(spec)
    found = {spec.name for members in groups.values() if _is_recurrent(members) for spec in members}
    return [spec._replace(kind="recurrent") if spec.name in found else spec for spec in specs]


def _is_recurrent(members: list[TensorSpec]) -> bool:
    matrices = [spec for spec in members if len(spec.shape) == 2]
    vectors = [spec for spec in members if len(spec.shape) == 1]
    if len(matrices) + len(vectors) != len(members) or any(spec.kind is not None for spec in members):
        return False
    rows = {spec.shape[spec.row_axis or 0] for spec in matrices} | {spec.shape[0] for spec in vectors}
    is_keras = any(spec.row_axis == 1 for spec in matrices)
    expected = 1 if is_keras else len(matrices)
    if (
        len(rows) != 1
        or 0 in rows
        or len(matrices) % 2
        or (is_keras and len(matrices) != 2)
        or len(vectors) != expected
    ):
        return False
    (size,) = rows
    columns = [spec.shape[1 - (spec.row_axis or 0)] for spec in matrices]
    return any(size == gates * hidden and 2 * columns.count(hidden) >= len(columns)
               for gates in (3, 4) for hidden in set(columns))  # fmt: skip
