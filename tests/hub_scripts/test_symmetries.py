"""Symmetries are found once for an architecture."""

import pytest
import torch
from torch import nn

from hub_scripts import symmetries
from hub_scripts.symmetries import cached_symmetries
from tokenization_sane import SaneWeightTokenizer


class Switched(nn.Module):
    """Its activation is an attribute, which no layout and no `repr` shows."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(3, 5), nn.Linear(5, 2), activation

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def kinds(module: nn.Module, rows: torch.Tensor = ROWS) -> set[str]:
    return {group.kind for group in cached_symmetries(module, SaneWeightTokenizer().layout(module), rows).groups}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SANE_CACHE", str(tmp_path))
    return tmp_path


def test_a_second_network_of_the_architecture_takes_what_was_found(monkeypatch):
    first = kinds(Switched(torch.tanh))
    monkeypatch.setattr(symmetries, "find_symmetries", lambda *_: pytest.fail("searched again"))
    assert kinds(Switched(torch.tanh)) == first == {"permutation", "sign"}


def test_networks_of_one_layout_and_other_functions_are_told_apart(cache_folder):
    assert kinds(Switched(torch.relu)) == {"permutation", "scale"}
    assert kinds(Switched(torch.tanh)) == {"permutation", "sign"}
    assert kinds(Switched(nn.functional.gelu)) == {"permutation"}
    assert len(list((cache_folder / "symmetries").iterdir())) == 3


def test_other_inputs_are_searched_anew(cache_folder):
    kinds(Switched(torch.tanh))
    kinds(Switched(torch.tanh), ROWS[:2])
    assert len(list((cache_folder / "symmetries").iterdir())) == 2
