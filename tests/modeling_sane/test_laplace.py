"""A kernel density with the shape of the Laplace approximation."""

import pytest
import torch

from modeling_sane import LaplaceSampler

A, N, L = 3, 5, 4


@pytest.fixture
def latents():
    return torch.randn(A, N, L, generator=torch.Generator().manual_seed(0))


def gradients_along(*values: int, size: float = 1.0) -> torch.Tensor:
    """Inputs whose answers depend on some values of an anchor only, one each: (inputs, tokens, latent_size)."""
    return size * torch.eye(N * L)[list(values)].view(-1, N, L)


def draw(sampler, n, seed=1):
    return sampler.sample(n, generator=torch.Generator().manual_seed(seed))


def test_what_the_function_depends_on_stays_and_the_rest_moves(latents):
    sampler = LaplaceSampler(bandwidth=0.5).fit(latents, gradients=[gradients_along(0, 7)] * A)
    moved = (draw(sampler, 2 * A) - latents.repeat(2, 1, 1)).flatten(1)
    assert moved[:, [0, 7]].abs().max() < 1e-2
    others = [i for i in range(N * L) if i not in (0, 7)]
    assert moved[:, others].std() > 0.3


def test_each_anchor_has_directions_of_its_own(latents):
    sampler = LaplaceSampler(bandwidth=0.5).fit(latents, gradients=[gradients_along(a) for a in range(A)])
    moved = (draw(sampler, A) - latents).flatten(1)
    assert moved.diagonal().abs().max() < 1e-2 < moved[0, 1].abs()


def test_the_noise_is_as_large_as_that_of_a_joint_kernel_density(latents):
    sampler = LaplaceSampler(bandwidth=0.3).fit(latents, gradients=[gradients_along(0, 1, 2)] * A)
    moved = draw(sampler, 6) - latents.repeat(2, 1, 1)
    torch.testing.assert_close(moved.flatten(1).square().mean(1).sqrt(), torch.full((6,), 0.3))


def test_softer_directions_move_as_the_inverse_square_root_of_what_they_change(latents):
    """With information 1 and stiffness 3 a direction moves half as much as a free one."""
    big = 4096
    anchors = torch.zeros(1, 1, big)
    sampler = LaplaceSampler(bandwidth=1.0, stiffness=3.0).fit(anchors, gradients=[torch.eye(big)[:1, None]])
    moved = sampler.sample(4000, generator=torch.Generator().manual_seed(0))[:, 0]
    assert float(moved[:, 0].std() / moved[:, 1].std()) == pytest.approx(0.5, rel=0.05)


def test_rank_keeps_the_directions_that_matter_most(latents):
    gradients = torch.cat([gradients_along(0, size=10.0), gradients_along(1, size=0.1)])
    sampler = LaplaceSampler(rank=1).fit(latents, gradients=[gradients] * A)
    assert sampler.directions.shape == (A, 1, N * L)
    moved = (draw(sampler, A) - latents).flatten(1).abs()
    assert moved[:, 0].max() < 1e-3 < moved[:, 1].max()


def test_draws_are_the_same_after_saving(latents, tmp_path):
    sampler = LaplaceSampler(bandwidth=0.4, stiffness=10.0).fit(latents, gradients=[gradients_along(3)] * A)
    sampler.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(LaplaceSampler.from_pretrained(tmp_path), 4), draw(sampler, 4))


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (None, "needs gradients"),
        ([gradients_along(0)], "gradients of 1 networks for 3 anchors"),
        ([torch.zeros(2, N, L + 1)] * A, r"The gradients of anchor 0 have shape \(2, 5, 5\)"),
        ([gradients_along(0), gradients_along(0) / 0, gradients_along(0)], "anchor 1 hold NaN"),
    ],
)
def test_gradients_are_checked(latents, gradients, message):
    with pytest.raises(ValueError, match=message):
        LaplaceSampler().fit(latents, gradients=gradients)


@pytest.mark.parametrize("options", [{"bandwidth": -1.0}, {"stiffness": float("inf")}, {"rank": 0}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LaplaceSampler(**options)
