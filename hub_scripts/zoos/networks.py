"""Sets of networks on disk: one safetensors file each, and what they are in `networks.json`.

```
networks/
  networks.json      architecture, task, layout, and the figures of each set
  joint/000.safetensors
  anchors/000.safetensors
  best/              of transformers architectures: the best generated network, for `from_pretrained(repo, subfolder="best")`
```
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from hub_scripts.outputs import read_json, write_json

NETWORKS_FILE = "networks.json"


def save_networks(folder: Path, sets: Mapping[str, Mapping[str, torch.Tensor]], info: Mapping[str, Any]) -> None:
    """Write each network of each set as a file of its own.

    Args:
        folder (`Path`): where; made if needed.
        sets (`Mapping[str, Mapping[str, torch.Tensor]]`): by name of the set, stacked tensors `(networks, *shape)`.
        info (`Mapping`): `architecture`, `architecture_kwargs`, `task` and whatever else shall be known of them.
    """
    for name, tensors in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(len(next(iter(tensors.values())))):
            network = {key: tensor[index].contiguous() for key, tensor in tensors.items()}
            save_file(network, folder / name / f"{index:03d}.safetensors", metadata={"format": "pt"})
    write_json(folder / NETWORKS_FILE, info)


def save_in_own_class(folder: Path, module: nn.Module, network: Mapping[str, torch.Tensor]) -> bool:
    """Write a network of a transformers architecture as `from_pretrained` of its own class reads it.

    Args:
        folder (`Path`): where; nothing is written for other architectures.
        module (`nn.Module`): the architecture.
        network (`Mapping[str, torch.Tensor]`): state dict; buffers that it lacks stay as the module has them.

    Returns:
        `bool`: True if it was written.
    """
    if not isinstance(module, PreTrainedModel):
        return False
    module = copy.deepcopy(module)
    module.load_state_dict(dict(network), strict=False)
    module.save_pretrained(folder)
    return True


def set_files(source: str | Path) -> list[Path]:
    """Files of the networks of a set; empty if the source is something else."""
    folder = Path(source)
    return sorted(folder.glob("*.safetensors")) if (folder.parent / NETWORKS_FILE).is_file() else []


def load_networks(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read one set: stacked tensors `(networks, *shape)`, and the `networks.json` of the folder above it.

    Raises:
        ValueError: If there is no network, no `networks.json`, or the networks differ in their tensors.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file; give a set of networks, such as DIR/networks/joint.")
    info_file = folder.parent / NETWORKS_FILE
    if not info_file.is_file():
        raise ValueError(f"{info_file} is missing; it says which architecture the networks of {folder} have.")
    networks = [load_file(file) for file in files]
    for file, network in zip(files, networks, strict=True):
        if {k: v.shape for k, v in network.items()} != {k: v.shape for k, v in networks[0].items()}:
            raise ValueError(f"{file} has other tensors than {files[0]}; a set holds networks of one layout.")
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}, read_json(info_file)
