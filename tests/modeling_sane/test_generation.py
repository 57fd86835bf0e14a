import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_sane import GaussianSampler, InterpolationSampler, KernelDensitySampler, load_sampler
from modeling_sane.generation_sane import draw_weights

A, N, L = 3, 5, 7  # anchors, tokens, latent_size


def anchors_far_apart():
    """Latents whose hundreds tell the anchor, so that a draw shows where each value comes from."""
    return 100.0 * torch.arange(A)[:, None, None] + torch.rand(A, N, L, generator=torch.Generator().manual_seed(0))


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def sources(samples):
    return (samples / 100).round()


def test_joint_draws_take_one_anchor_a_sample():
    chosen = sources(KernelDensitySampler("joint").fit(anchors_far_apart()).sample(200, generator=generator()))
    assert chosen.shape == (200, N, L)
    assert (chosen == chosen[:, :1, :1]).all()
    assert set(chosen.flatten().tolist()) == {0, 1, 2}


def test_token_draws_take_one_anchor_a_token():
    chosen = sources(KernelDensitySampler("token").fit(anchors_far_apart()).sample(200, generator=generator()))
    assert (chosen == chosen[:, :, :1]).all()
    assert (chosen != chosen[:, :1]).any()


def test_dimension_draws_take_one_anchor_a_value():
    chosen = sources(KernelDensitySampler("dimension").fit(anchors_far_apart()).sample(200, generator=generator()))
    assert (chosen != chosen[:, :, :1]).any()
    counts = torch.stack([(chosen == anchor).float().mean() for anchor in range(A)])
    assert counts == pytest.approx([1 / 3] * A, abs=0.03)


@pytest.mark.parametrize("mode", ["joint", "token", "dimension"])
def test_noise_has_the_bandwidth_and_is_independent_for_every_token(mode):
    latents = anchors_far_apart()[:1]
    noise = KernelDensitySampler(mode, bandwidth=0.5).fit(latents).sample(4000, generator=generator()) - latents
    covariance = torch.cov(noise.flatten(1).T)
    torch.testing.assert_close(covariance, 0.25 * torch.eye(N * L), rtol=0, atol=0.03)


def test_without_bandwidth_draws_are_anchors():
    latents = anchors_far_apart()
    samples = KernelDensitySampler("joint", bandwidth=0.0).fit(latents).sample(20, generator=generator())
    assert all(any(torch.equal(sample, anchor) for anchor in latents) for sample in samples)


def test_relative_bandwidth_counts_in_standard_deviations_of_each_dimension():
    latents = torch.randn(A, N, L, generator=generator()) * torch.arange(1.0, L + 1)
    options = {"mode": "joint", "bandwidth": 0.5}
    centers = KernelDensitySampler(mode="joint", bandwidth=0.0).fit(latents).sample(6000, generator=generator(2))
    noise = KernelDensitySampler(**options, scale="std").fit(latents).sample(6000, generator=generator(2)) - centers
    expected = 0.5 * latents.flatten(0, 1).std(dim=0, correction=0)
    torch.testing.assert_close(noise.flatten(0, 1).std(dim=0), expected, rtol=0.03, atol=0)


def test_gaussian_draws_have_mean_and_covariance_of_the_anchors():
    latents = torch.randn(4, 2, 3, generator=generator())
    samples = GaussianSampler().fit(latents).sample(40_000, generator=generator()).flatten(1)
    torch.testing.assert_close(samples.mean(dim=0), latents.mean(dim=0).flatten(), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(samples.T), torch.cov(latents.flatten(1).T), rtol=0, atol=0.06)


def test_gaussian_draws_stay_in_the_span_of_the_anchors_without_a_rest():
    latents = torch.randn(A, N, L, generator=generator())
    deviations = (latents - latents.mean(dim=0)).flatten(1)
    basis = torch.linalg.svd(deviations, full_matrices=False)[2][: A - 1]
    for rest, outside in ((0.0, 0.0), (0.3, 0.3)):
        drawn = GaussianSampler(rest).fit(latents).sample(2000, generator=generator()) - latents.mean(dim=0)
        drawn = drawn.flatten(1)
        left = (drawn - drawn @ basis.T @ basis).square().sum() / (2000 * (N * L - A + 1))
        assert left.sqrt().item() == pytest.approx(outside, abs=0.01)


def test_a_gaussian_of_low_rank_keeps_the_leading_directions():
    latents = torch.randn(6, N, L, generator=generator())
    mean = latents.mean(dim=0)
    basis = torch.linalg.svd((latents - mean).flatten(1), full_matrices=False)[2]
    full = GaussianSampler().fit(latents).sample(9, generator=generator())
    for rank in (1, 2, 5, 8):
        drawn = GaussianSampler(rank=rank).fit(latents).sample(9, generator=generator())
        leading = basis[: min(rank, 5)]
        expected = mean + ((full - mean).flatten(1) @ leading.T @ leading).view_as(full)
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
        assert torch.linalg.matrix_rank((drawn - mean).flatten(1), rtol=1e-4) == min(rank, 5)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), anchors=st.integers(2, 9), low=st.floats(0, 3), more=st.floats(0, 3))
def test_interpolation_weights_sum_to_one_and_mix_the_number_asked_for(data, anchors, low, more):
    mixed, seed = data.draw(st.integers(2, anchors)), data.draw(st.integers(0, 2**32))
    factors = (low, low + more)
    weights = draw_weights(20, anchors, mixed, factors, torch.device("cpu"), generator(seed))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(20, dtype=torch.float64))
    assert ((weights != 0).sum(dim=1) <= mixed).all()
    furthest = max(1 / mixed, factors[1] * (1 - 1 / mixed) + 1 / mixed)
    assert weights.max() <= furthest + 1e-9
    assert weights.min() >= min(0, (1 - factors[1]) / mixed) - 1e-9


def test_interpolation_weights_are_uniform_and_choose_all_anchors_alike():
    weights = draw_weights(6000, 5, 3, (1.0, 1.0), torch.device("cpu"), generator())
    assert ((weights > 0).sum(dim=1) == 3).all()
    assert (weights > 0).double().mean(dim=0) == pytest.approx([0.6] * 5, abs=0.03)
    # uniform on a triangle: a coordinate has mean 1/3 and variance 1/18
    assert weights[weights > 0].mean().item() == pytest.approx(1 / 3, abs=0.005)
    assert weights[weights > 0].var().item() == pytest.approx(1 / 18, abs=0.002)


def test_interpolated_draws_lie_on_the_line_through_two_anchors():
    latents = torch.stack([torch.zeros(N, L), torch.ones(N, L)])
    for factors, first, last in (((1.0, 1.0), 0.0, 1.0), ((2.0, 2.0), -0.5, 1.5), ((0.0, 0.0), 0.5, 0.5)):
        drawn = InterpolationSampler(factor_range=factors).fit(latents).sample(4000, generator=generator())
        along = drawn[:, 0, 0]
        torch.testing.assert_close(drawn, along[:, None, None].expand_as(drawn))
        assert along.min().item() == pytest.approx(first, abs=0.01)
        assert along.max().item() == pytest.approx(last, abs=0.01)
        assert along.std().item() == pytest.approx((last - first) / 12**0.5, abs=0.02)


SAMPLERS = [
    KernelDensitySampler("token", bandwidth=0.3, scale="std"),
    KernelDensitySampler("dimension"),
    GaussianSampler(rest=0.1),
    GaussianSampler(rank=1),
    InterpolationSampler(mixed=3, factor_range=(0.9, 1.4)),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_sampler_draws_the_same_bits(tmp_path, sampler, dtype):
    sampler.fit(anchors_far_apart().to(dtype))
    sampler.save_pretrained(tmp_path / "sampler")
    assert {path.name for path in (tmp_path / "sampler").iterdir()} == {"sampler_config.json", "sampler.safetensors"}
    loaded = type(sampler).from_pretrained(tmp_path / "sampler")
    expected = sampler.sample(4, generator=generator())
    assert expected.dtype == dtype
    torch.testing.assert_close(loaded.sample(4, generator=generator()), expected, rtol=0, atol=0)
    loaded = load_sampler(tmp_path / "sampler")
    assert type(loaded) is type(sampler)
    torch.testing.assert_close(loaded.to("cpu").sample(4, generator=generator()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_a_generator_decides_every_draw(sampler):
    sampler.fit(anchors_far_apart())
    first, again, other = (sampler.sample(4, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fit_keeps_its_own_copy():
    latents = anchors_far_apart()
    sampler = KernelDensitySampler("joint", bandwidth=0.0).fit(latents)
    expected = sampler.sample(3, generator=generator())
    latents.zero_()
    assert torch.equal(sampler.sample(3, generator=generator()), expected)


def test_a_sampler_of_another_class_is_refused(tmp_path):
    GaussianSampler().fit(anchors_far_apart()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a GaussianSampler, not a KernelDensitySampler"):
        KernelDensitySampler.from_pretrained(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no sampler_config\.json"):
        GaussianSampler.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no sampler_config\.json"):
        load_sampler(tmp_path)


def test_an_unknown_class_is_refused(tmp_path):
    GaussianSampler().fit(anchors_far_apart()).save_pretrained(tmp_path)
    (tmp_path / "sampler_config.json").write_text(json.dumps({"sampler": "Dice"}))
    with pytest.raises(ValueError, match="holds a Dice, which is none of ComponentFlowSampler, GaussianSampler, "):
        load_sampler(tmp_path)


@pytest.mark.parametrize("kind", [KernelDensitySampler, GaussianSampler, InterpolationSampler])
def test_bad_input_is_refused(kind, tmp_path):
    latents = anchors_far_apart()
    with pytest.raises(ValueError, match=r"not fitted. Call fit\(latents\) first"):
        kind().sample(2)
    with pytest.raises(ValueError, match="not fitted"):
        kind().save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match=r"shape \(5, 7\), expected \(anchors, tokens, latent_size\)"):
        kind().fit(latents[0])
    with pytest.raises(ValueError, match="Got 0 anchors"):
        kind().fit(latents[:0])
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        kind().fit(latents.long())
    broken = latents.clone()
    broken[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"anchors \[1\] hold NaN"):
        kind().fit(broken)
    with pytest.raises(ValueError, match="knows no conditions"):
        kind().fit(latents, condition=latents)
    fitted = kind().fit(latents)
    with pytest.raises(ValueError, match="Asked for 0 samples"):
        fitted.sample(0)
    with pytest.raises(ValueError, match="knows no conditions"):
        fitted.sample(2, condition=latents)


@pytest.mark.parametrize(
    ("sampler", "needed"), [(GaussianSampler(), 2), (InterpolationSampler(), 2), (InterpolationSampler(mixed=3), 3)]
)
def test_too_few_anchors_are_refused(sampler, needed):
    message = f"Got {needed - 1} anchors, {type(sampler).__name__} needs at least {needed}"
    with pytest.raises(ValueError, match=message):
        sampler.fit(anchors_far_apart()[: needed - 1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (KernelDensitySampler, {"mode": "individual"}),
        (KernelDensitySampler, {"bandwidth": -0.1}),
        (KernelDensitySampler, {"bandwidth": float("nan")}),
        (KernelDensitySampler, {"scale": "relative"}),
        (GaussianSampler, {"rest": -0.1}),
        (GaussianSampler, {"rank": 0}),
        (InterpolationSampler, {"mixed": 1}),
        (InterpolationSampler, {"factor_range": (1.5, 1.0)}),
        (InterpolationSampler, {"factor_range": (-1.0, 1.0)}),
        (InterpolationSampler, {"factor_range": (1.0,)}),
    ],
)
def test_bad_options_are_refused(kind, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        kind(**options)


@pytest.mark.parametrize("mode", ["joint", "token", "dimension"])
def test_a_thousand_samples_take_a_fraction_of_a_second(mode):
    sampler = KernelDensitySampler(mode).fit(torch.randn(30, 104, 24, generator=generator()))
    sampler.sample(10)
    start = time.perf_counter()
    sampler.sample(1000, generator=generator())
    # 0.03 to 0.05 s on one idle core; a loop over tokens or samples would take far longer than this
    assert time.perf_counter() - start < 0.5
