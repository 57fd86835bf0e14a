"""Flows over whole networks, fitted to a few points far from each other, or to clusters, in a second or two."""

import pytest
import torch

from modeling_sane import ComponentFlowSampler, load_sampler

A, N, L = 6, 5, 3  # networks, tokens, latent_size
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "train_steps": 2, "batch_size": 4, "num_steps": 3}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 20}


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def random_latents(networks=A, tokens=N):
    return 2 + 3 * torch.randn(networks, tokens, L, generator=generator(0))


def nearest(drawn, latents):
    return torch.cdist(drawn.flatten(1), latents.flatten(1)).min(dim=1)


def test_a_few_networks_are_learned_by_heart_as_wholes():
    latents = random_latents(tokens=40)
    drawn = (
        ComponentFlowSampler(**SMALL, train_steps=500, ema_decay=0.98).fit(latents).sample(60, generator=generator())
    )
    distance, index = nearest(drawn, latents)
    apart = torch.pdist(latents.flatten(1)).min()
    assert (distance < 0.25 * apart).float().mean() > 0.9
    assert len(index.unique()) == A  # every one of them is drawn


def test_draws_have_the_property_that_is_asked_for():
    condition = torch.rand(200, 1, generator=generator(0))
    latents = random_latents(1) + (condition * 10)[..., None] + 0.1 * torch.randn(200, N, L, generator=generator(2))
    sampler = ComponentFlowSampler(**SMALL, train_steps=400, ema_decay=0.98).fit(latents, 50 + 10 * condition)
    asked = torch.linspace(51, 59, 50)[:, None]
    found = 50 + (sampler.sample(50, asked, generator()) - random_latents(1)).mean(dim=(1, 2))
    assert torch.corrcoef(torch.stack([asked[:, 0], found]))[0, 1] > 0.95
    anything = sampler.sample(100, None, generator()).mean(dim=(1, 2))
    assert anything.std() > 2


def test_draws_stay_in_the_span_of_the_networks():
    latents = random_latents()
    drawn = ComponentFlowSampler(**TINY).fit(latents).sample(4, generator=generator()) - latents.mean(0)
    basis = torch.linalg.svd((latents - latents.mean(0)).flatten(1), full_matrices=False).Vh[: A - 1]
    torch.testing.assert_close(drawn.flatten(1) @ basis.T @ basis, drawn.flatten(1))


def test_fewer_components_are_the_strongest():
    latents = 0.01 * torch.randn(50, N, L, generator=generator(0))
    latents[:, 0, 0] += torch.linspace(-5, 5, 50)
    latents[:, 2, 1] += 3 * torch.linspace(-1, 1, 50) ** 2
    sampler = ComponentFlowSampler(**TINY, num_components=2).fit(latents)
    assert sampler.components.shape == (2, N, L)
    strengths = sampler.components.abs()
    assert strengths[0, 0, 0] > 0.99
    assert strengths[1, 2, 1] > 0.99


def test_a_batch_of_a_draw_does_not_change_it():
    sampler = ComponentFlowSampler(**TINY).fit(random_latents())
    parts = sampler.sample(11, generator=generator())
    sampler.batch_size = 100
    torch.testing.assert_close(sampler.sample(11, generator=generator()), parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_flow_draws_the_same_bits_and_touches_no_other_randomness(tmp_path, dtype):
    before = torch.random.get_rng_state()
    condition = torch.randn(A, 2, generator=generator())
    sampler = ComponentFlowSampler(**TINY, guidance=1.5, num_components=3).fit(random_latents().to(dtype), condition)
    sampler.save_pretrained(tmp_path)
    loaded = load_sampler(tmp_path)
    assert type(loaded) is ComponentFlowSampler
    expected = sampler.sample(4, condition[0], generator())
    assert expected.dtype == dtype
    assert torch.equal(loaded.sample(4, condition[0], generator()), expected)
    assert torch.equal(loaded.to("cpu").sample(4, condition[0], generator()), expected)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_learned_is_refused():
    flow = ComponentFlowSampler(**TINY)
    with pytest.raises(ValueError, match="Got 1 anchors, ComponentFlowSampler needs at least 2"):
        flow.fit(random_latents(1))
    with pytest.raises(ValueError, match="All networks have the same latents"):
        flow.fit(random_latents(1).expand(4, -1, -1))
    with pytest.raises(ValueError, match=r"expected \(networks, conditions\) with 6 networks"):
        flow.fit(random_latents(), torch.zeros(A))
    with pytest.raises(ValueError, match="fitted without conditions"):
        flow.fit(random_latents()).sample(2, torch.zeros(1))
    with pytest.raises(ValueError, match="num_components is 0, expected at least 1"):
        ComponentFlowSampler(num_components=0)
