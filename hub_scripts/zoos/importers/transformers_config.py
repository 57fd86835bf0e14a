"""The architecture that a transformers `config.json` describes, as rows of a zoo name it."""

from collections.abc import Mapping
from typing import Any

import transformers

# about the file, not about the network
_METADATA = ("architectures", "transformers_version", "torch_dtype", "dtype", "model_type", "auto_map")


def architecture_of(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Name and keyword arguments for [`~hub_scripts.evaluation.functional.build_module`].

    Args:
        config (`Mapping[str, Any]`): what `config.json` holds.

    Returns:
        `tuple[str | None, dict]`: None and nothing if transformers has no such class, as with a model that brings its own code.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or names[0] not in dir(transformers):
        return None, {}
    # names that begin with _ say where the configuration came from and which kernels ran it
    kwargs = {key: value for key, value in config.items() if key not in _METADATA and not key.startswith("_")}
    return f"transformers:{names[0]}", kwargs
