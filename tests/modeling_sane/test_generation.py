import time

import pytest
import torch

from modeling_sane import GaussianSampler, KernelDensitySampler

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


SAMPLERS = [
    KernelDensitySampler("token", bandwidth=0.3, scale="std"),
    KernelDensitySampler("dimension"),
    GaussianSampler(rest=0.1),
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


@pytest.mark.parametrize("kind", [KernelDensitySampler, GaussianSampler])
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


def test_gaussian_needs_two_anchors():
    with pytest.raises(ValueError, match="Got 1 anchors, GaussianSampler needs at least 2"):
        GaussianSampler().fit(anchors_far_apart()[:1])


@pytest.mark.parametrize(
    "options", [{"mode": "individual"}, {"bandwidth": -0.1}, {"bandwidth": float("nan")}, {"scale": "relative"}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        KernelDensitySampler(**options)


@pytest.mark.parametrize("mode", ["joint", "token", "dimension"])
def test_a_thousand_samples_take_a_fraction_of_a_second(mode):
    sampler = KernelDensitySampler(mode).fit(torch.randn(30, 104, 24, generator=generator()))
    sampler.sample(10)
    start = time.perf_counter()
    sampler.sample(1000, generator=generator())
    # 0.03 to 0.05 s on one idle core; a loop over tokens or samples would take far longer than this
    assert time.perf_counter() - start < 0.5
