"""Symmetries of an architecture, found once and kept in the cache by its layout's fingerprint and all that makes its function."""

import hashlib
import inspect
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokenization_sane
from hub_scripts.outputs import cache_folder, write_text
from tokenization_sane import CheckpointLayout, SymmetrySpec, find_symmetries

LIBRARIES = ("torch", "torch-pruning", "transformers")


def cached_symmetries(module: nn.Module, layout: CheckpointLayout, example_inputs: Any) -> SymmetrySpec:
    """What [`find_symmetries`] gives; in no time if the same architecture was asked for before.

    Two networks of one layout may differ in their function (tanh or ReLU), so the fingerprint alone does not name a spec: structure,
    settings and code of all modules, inputs, and the versions of the libraries do it together.

    Args:
        module (`nn.Module`): the network; its weights do not matter.
        layout ([`CheckpointLayout`]): its layout.
        example_inputs (`Any`): as for `find_symmetries`.
    """
    key = hashlib.sha256(json.dumps(_described(module, example_inputs)).encode()).hexdigest()[:16]
    path = cache_folder("symmetries") / f"{layout.fingerprint}-{key}.json"
    if path.is_file():
        return SymmetrySpec.from_json(path.read_text(encoding="utf-8"))
    spec = find_symmetries(module, example_inputs)
    write_text(path, spec.to_json())
    return spec


def _described(module: nn.Module, example_inputs: Any) -> list[Any]:
    modules = list(module.modules())
    config = getattr(module, "config", None)
    return [
        repr(module),
        [[_plain(vars(one)), hasattr(one, "training") and one.training] for one in modules],
        config.to_json_string() if hasattr(config, "to_json_string") else None,
        sorted({_source(type(one)) for one in modules}),
        _shapes(example_inputs),
        [version(name) for name in LIBRARIES],
        _own_code(),
    ]


def _plain(attributes: dict[str, Any]) -> list[tuple[str, str]]:
    """Settings among the attributes of a module, and names of functions that it holds."""
    kept = (bool, int, float, str, tuple, list, type(None))
    found = {name: value for name, value in attributes.items() if isinstance(value, kept)}
    functions = {
        name: f"{value.__module__}.{value.__qualname__}"
        for name, value in attributes.items()
        if inspect.isroutine(value) or inspect.isclass(value)
    }
    return sorted((name, repr(value)) for name, value in (found | functions).items())


@cache
def _source(kind: type) -> str:
    """Code of a class; of what has none (or is made on the fly), its name."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


def _shapes(inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return [list(inputs.shape), str(inputs.dtype)]
    if isinstance(inputs, dict):
        return {name: _shapes(value) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return [_shapes(value) for value in inputs]
    return repr(inputs)


@cache
def _own_code() -> str:
    """Changes with the code that finds symmetries."""
    files = sorted(Path(tokenization_sane.__file__).parent.glob("*_sane.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
