"""Flows are fitted to distributions that can be written down, small enough to be learned in a second or two."""

import sys

import pytest
import torch

from modeling_sane import LatentFlowSampler, load_sampler
from modeling_sane.token_flow_sane import nearest_tokens

A, N, L = 5, 7, 3  # networks, tokens, latent_size
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "train_steps": 2, "batch_size": 4}


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def random_latents(networks=A, tokens=N):
    return 2 + 3 * torch.randn(networks, tokens, L, generator=generator(0))


def layout(tokens=N, channels=4):
    """Layers of `channels` tokens each, the second half of the tokens of another kind."""
    n = torch.arange(tokens)
    return {
        "position_ids": torch.stack([n, n // channels, n % channels], dim=1),
        "layer_kind_ids": (n >= tokens // 2).long(),
    }


CENTER = torch.tensor([1.0, -1.0, 1.0])


@pytest.fixture(scope="module")
def flow():
    """Fitted to 300 networks: their first token is one condition, their last another one in another unit, and what stands
    between is one of two clusters."""
    condition = torch.randn(300, 2, generator=generator(0))
    side = torch.where(torch.arange(300) % 4 == 0, -2.0, 2.0)
    latents = 0.2 * torch.randn(300, 4, 3, generator=generator())
    latents[:, 0] += condition[:, :1]
    latents[:, 1:3] += side[:, None, None] * CENTER
    latents[:, 3] += condition[:, 1:]
    condition = 50 + 10 * condition
    condition[::3, 1] = torch.nan
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "batch_size": 64}
    training = {"train_steps": 600, "learning_rate": 1e-2, "warmup_steps": 20, "ema_decay": 0.99}
    return LatentFlowSampler(**options, **training).fit(latents, condition)


def measured(latents):
    """Both properties of each network, in the unit of the conditions."""
    return 50 + 10 * torch.stack([latents[:, 0].mean(dim=1), latents[:, 3].mean(dim=1)], dim=1)


def test_draws_come_from_two_clusters_in_their_shares(flow):
    drawn = flow.sample(400, generator=generator())[:, 1:3]
    along = (drawn * CENTER).mean(dim=(1, 2))
    # a normal distribution with the same covariance would have every fourth draw between the clusters
    assert (along.abs() > 1).float().mean() > 0.97
    assert (along < 0).float().mean().item() == pytest.approx(0.25, abs=0.08)
    around = drawn - 2 * along.sign()[:, None, None] * CENTER
    assert around.std().item() == pytest.approx(0.2, abs=0.1)


def test_draws_have_the_properties_that_are_asked_for(flow):
    asked = 50 + 10 * torch.randn(200, 2, generator=generator(2))
    found = measured(flow.sample(200, asked, generator()))
    for one, other in zip(asked.T, found.T, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.95
        assert (one - other).std() < 0.35 * one.std()


def test_an_unknown_condition_may_be_anything(flow):
    found = measured(flow.sample(300, torch.tensor([65.0, torch.nan]), generator()))
    assert found[:, 0].mean().item() == pytest.approx(65, abs=2)
    assert found[:, 0].std() < 6
    assert found[:, 1].mean().item() == pytest.approx(50, abs=3)
    assert 7 < found[:, 1].std() < 13
    nothing = flow.sample(300, torch.full((2,), torch.nan), generator())
    assert torch.equal(nothing, flow.sample(300, None, generator()))
    assert 7 < measured(nothing)[:, 0].std() < 13


def test_guidance_goes_from_no_condition_to_the_condition_and_beyond(flow):
    asked = torch.tensor([65.0, 50.0])
    draws = {g: flow.sample(100, asked, generator(), guidance=g) for g in (0.0, 1.0, 1.5)}
    torch.testing.assert_close(draws[0.0], flow.sample(100, None, generator()))
    torch.testing.assert_close(draws[1.0], flow.sample(100, asked, generator()), rtol=0, atol=0)
    spread = [measured(draw)[:, 0].std().item() for draw in draws.values()]
    assert spread[0] > 2 * spread[1]
    assert spread[1] > spread[2]


def test_another_layout_takes_mean_and_scale_of_the_most_similar_tokens():
    latents = torch.randn(50, N, L, generator=generator(0))
    latents[:, : N // 2] += 100  # the tokens of one kind
    sampler = LatentFlowSampler(**TINY).fit(latents, **layout())
    longer = sampler.sample(30, generator=generator(), **layout(17))
    assert longer.shape == (30, 17, L)
    expected = 100.0 * (layout(17)["layer_kind_ids"] == 0)[:, None].expand(17, L)
    torch.testing.assert_close(longer.mean(dim=0), expected, rtol=0, atol=1.5)
    same = sampler.sample(3, generator=generator(), **layout())
    torch.testing.assert_close(same, sampler.sample(3, generator=generator()), rtol=0, atol=0)


def test_similar_tokens_are_of_the_same_kind_then_layer_then_channel():
    # sequence, layer, channel; channel 0 of layer 1 takes two tokens
    known = torch.tensor([[0, 0, 0], [1, 0, 5], [2, 1, 0], [3, 1, 0], [4, 4, 0]])
    kinds = torch.tensor([0, 0, 0, 0, 1])
    wanted = torch.tensor([[0, 0, 2], [1, 0, 9], [2, 2, 3], [3, 2, 3], [4, 2, 3], [5, 0, 0]])
    wanted_kinds = torch.tensor([0, 0, 0, 0, 0, 1])
    assert nearest_tokens((wanted, wanted_kinds), (known, kinds)).tolist() == [0, 1, 2, 3, 3, 4]
    assert nearest_tokens((known, kinds), (known, kinds)).tolist() == [0, 1, 2, 3, 4]
    assert nearest_tokens((wanted[-1:], None), (known, None)).tolist() == [0]


def test_a_window_of_the_whole_sequence_changes_nothing():
    whole = LatentFlowSampler(**TINY).fit(random_latents()).sample(3, generator=generator())
    window = LatentFlowSampler(**TINY, window_size=N, halo=2).fit(random_latents()).sample(3, generator=generator())
    torch.testing.assert_close(window, whole, rtol=0, atol=0)


def test_windows_cover_the_sequence_with_one_noise():
    # without attention a token does not see its neighbours, so windows must give what the whole sequence gives
    options = {**TINY, "num_hidden_layers": 0, "train_steps": 20}
    sampler = LatentFlowSampler(**options, window_size=5, halo=1).fit(random_latents(tokens=17))
    windows = sampler.sample(6, generator=generator())
    sampler.window_size = 17
    torch.testing.assert_close(windows, sampler.sample(6, generator=generator()))


def test_no_step_sees_more_than_a_window_with_its_halo():
    sampler = LatentFlowSampler(**{**TINY, "train_steps": 40}, window_size=5, halo=1)
    shapes, starts = [], []
    build = sampler._build_network

    def recorded(state):
        network = build(state)
        network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        network.register_forward_pre_hook(lambda _, inputs: starts.append(inputs[2][:, 0, 0].tolist()))
        return network

    sampler._build_network = recorded
    sampler.fit(random_latents(tokens=17))
    assert shapes == [(4, 5, L)] * 40
    assert {start for batch in starts for start in batch} == set(range(13))
    shapes.clear()
    starts.clear()
    sampler.sample(6, num_steps=1)
    assert shapes == [(4, 5, L)] * 6 + [(2, 5, L)] * 6
    # 17 tokens are cores of three from 0, 3, 6, 9, 12 and 15; the first and the last window move inward
    assert starts == [[0], [2], [5], [8], [11], [12]] * 2


def test_what_does_not_differ_between_networks_stays():
    latents = random_latents()
    latents[1:] = latents[0]
    drawn = LatentFlowSampler(**TINY).fit(latents).sample(3, generator=generator())
    torch.testing.assert_close(drawn, latents[:3], rtol=0, atol=1e-4)


def test_seeds_decide_fit_and_draw_and_touch_no_other_randomness():
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    options = {**TINY, "train_steps": 5}
    sampler, again = (LatentFlowSampler(**options).fit(random_latents()) for _ in range(2))
    first = sampler.sample(3, generator=generator())
    assert torch.equal(first, again.sample(3, generator=generator()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(first, sampler.sample(3, generator=generator(2)))
    other = LatentFlowSampler(**options, seed=1).fit(random_latents())
    assert not torch.equal(first, other.sample(3, generator=generator()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_flow_draws_the_same_bits(tmp_path, dtype):
    condition = torch.randn(A, 2, generator=generator())
    sampler = LatentFlowSampler(**TINY, guidance=1.5, num_steps=3)
    sampler.fit(random_latents().to(dtype), condition, **layout()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sampler_config.json", "sampler.safetensors"}
    loaded = load_sampler(tmp_path)
    assert type(loaded) is LatentFlowSampler
    expected = sampler.sample(4, condition[0], generator())
    assert expected.dtype == dtype
    torch.testing.assert_close(loaded.sample(4, condition[0], generator()), expected, rtol=0, atol=0)
    torch.testing.assert_close(loaded.to("cpu").sample(4, condition[0], generator()), expected, rtol=0, atol=0)


def test_a_sampler_can_be_fitted_again_to_something_else():
    sampler = LatentFlowSampler(**TINY).fit(random_latents(), torch.randn(A, 2, generator=generator()), **layout())
    sampler.fit(random_latents(tokens=4))
    expected = LatentFlowSampler(**TINY).fit(random_latents(tokens=4)).sample(2, generator=generator())
    torch.testing.assert_close(sampler.sample(2, generator=generator()), expected, rtol=0, atol=0)


def test_only_drawing_needs_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sampler = LatentFlowSampler(**TINY).fit(random_latents())
    with pytest.raises(ImportError, match=r'pip install "sane-hub\[flow\]"'):
        sampler.sample(2)


def test_latents_that_cannot_be_learned_are_refused(tmp_path):
    flow = LatentFlowSampler(**TINY)
    with pytest.raises(ValueError, match=r"not fitted. Call fit\(latents\) first"):
        flow.sample(2)
    with pytest.raises(ValueError, match="not fitted"):
        flow.save_pretrained(tmp_path / "never")
    with pytest.raises(ValueError, match="Got 1 anchors, LatentFlowSampler needs at least 2"):
        flow.fit(random_latents(1))
    with pytest.raises(ValueError, match=r"shape \(7, 3\), expected \(anchors, tokens, latent_size\)"):
        flow.fit(random_latents()[0])
    broken = random_latents()
    broken[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"anchors \[3\] hold NaN"):
        flow.fit(broken)
    with pytest.raises(ValueError, match="not fitted"):
        flow.sample(2)  # a refused fit leaves nothing behind


def test_conditions_that_do_not_fit_are_refused():
    flow, latents = LatentFlowSampler(**TINY), random_latents()
    condition = torch.randn(A, 2, generator=generator())
    for wrong in (condition[:, 0], condition[:3], condition[:, :0]):
        with pytest.raises(ValueError, match=r"expected \(networks, conditions\) with 5 networks"):
            flow.fit(latents, wrong)
    with pytest.raises(ValueError, match="infinite"):
        flow.fit(latents, condition / 0)
    useless = torch.stack([condition[:, 0], torch.full((A,), 0.3), torch.full((A,), torch.nan)], dim=1)
    with pytest.raises(ValueError, match=r"Conditions \[1, 2\] are unknown or the same for all"):
        flow.fit(latents, useless)
    flow.fit(latents, condition)
    for wrong in (torch.zeros(3), torch.zeros(4, 3), torch.zeros(3, 2), torch.zeros(1, 4, 2)):
        with pytest.raises(ValueError, match=r"expected \(2,\) or \(4, 2\)"):
            flow.sample(4, wrong)
    with pytest.raises(ValueError, match="infinite"):
        flow.sample(4, torch.tensor([0.0, torch.inf]))
    with pytest.raises(ValueError, match="fitted without conditions"):
        flow.fit(latents).sample(4, condition[0])


def test_layouts_that_do_not_fit_are_refused():
    flow, latents, good = LatentFlowSampler(**TINY), random_latents(), layout()
    with pytest.raises(ValueError, match="latents has 7 tokens, position_ids 6"):
        flow.fit(latents, **layout(6))
    with pytest.raises(ValueError, match=r"shape \(1, 7, 3\), expected \(tokens, 3\)"):
        flow.fit(latents, position_ids=good["position_ids"][None])
    with pytest.raises(ValueError, match=r"shape \(6,\), expected \(7,\)"):
        flow.fit(latents, position_ids=good["position_ids"], layer_kind_ids=good["layer_kind_ids"][1:])
    with pytest.raises(ValueError, match="negative or no integers"):
        flow.fit(latents, position_ids=good["position_ids"] - 1)
    flow.fit(latents, **good)
    with pytest.raises(ValueError, match="fitted with layer_kind_ids"):
        flow.sample(2, position_ids=good["position_ids"])
    with pytest.raises(ValueError, match="without position_ids"):
        flow.sample(2, layer_kind_ids=good["layer_kind_ids"])
    with pytest.raises(ValueError, match="reaches 9, this sampler knows 0 to 5"):
        flow.sample(2, position_ids=good["position_ids"], layer_kind_ids=9 * good["layer_kind_ids"])
    with pytest.raises(ValueError, match="fitted without layer_kind_ids"):
        flow.fit(latents).sample(2, **good)
    for wrong in ({"n": 0}, {"n": 2, "num_steps": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            flow.sample(**wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 30},
        {"num_steps": 0},
        {"train_steps": 0},
        {"num_hidden_layers": -1},
        {"halo": 128},
        {"condition_dropout": 1.0},
        {"learning_rate": float("nan")},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        LatentFlowSampler(**options)


def test_a_training_that_diverges_says_so():
    with pytest.raises(RuntimeError, match="diverged"):
        LatentFlowSampler(**{**TINY, "train_steps": 20}, learning_rate=1e30, warmup_steps=0).fit(random_latents())
