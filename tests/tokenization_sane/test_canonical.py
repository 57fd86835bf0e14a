import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hub_scripts.zoos.architectures import MLP, SmallCNN, SmallResNet
from tokenization_sane import canonical_order, find_symmetries

NETWORKS = {
    "tanh": lambda: MLP(image_size=4, hidden_sizes=(6, 5), activation="tanh"),
    "cnn": lambda: SmallCNN(channels=(4, 5), hidden_size=6),
    "resnet": lambda: SmallResNet(channels=(4, 6)),
    "lstm": lambda: nn.LSTM(3, 5),
}
INPUTS = {"tanh": (2, 1, 4, 4), "cnn": (2, 1, 8, 8), "resnet": (2, 1, 8, 8), "lstm": (4, 2, 3)}
SPECS = {}


def network(name: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    module = NETWORKS[name]()
    if name not in SPECS:
        SPECS[name] = find_symmetries(module, torch.randn(INPUTS[name]))
    state_dict = {key: tensor.double() for key, tensor in module.state_dict().items()}
    return {k: torch.randn_like(v) for k, v in state_dict.items()}


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 10**6))
def test_twins_come_out_equal(name, seed):
    """A network and one with other signs and another order of its units; both get the order that is their own."""
    state_dict = network(name, seed)
    spec = SPECS[name].of_kind("permutation", "sign")
    twin = spec.apply(state_dict, spec.draw(torch.Generator().manual_seed(seed)))
    stacked = {key: torch.stack([state_dict[key], twin[key]]) for key in state_dict}
    ordered = canonical_order(spec, stacked)
    assert ordered.keys() == stacked.keys()
    for tensor in ordered.values():
        torch.testing.assert_close(tensor[0], tensor[1], rtol=1e-9, atol=1e-9)


def test_the_function_stays():
    module = SmallCNN(channels=(4, 5), hidden_size=6).eval()
    images = torch.randn(3, 1, 8, 8)
    before = module(images)
    spec = find_symmetries(module, images)
    ordered = canonical_order(spec, {key: tensor[None] for key, tensor in module.state_dict().items()})
    assert not torch.equal(ordered["conv2.weight"][0], module.conv2.weight)
    module.load_state_dict({key: tensor[0] for key, tensor in ordered.items()})
    torch.testing.assert_close(module(images), before, rtol=1e-4, atol=1e-5)
