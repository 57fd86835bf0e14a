import numpy as np
import pytest
import torch

from hub_scripts.evaluation.baselines import (
    average_anchors,
    layer_statistics,
    nearest_distances,
    noise_around,
    r2_score_masked,
    token_pca,
    weight_features,
)
from hub_scripts.evaluation.features import DEFAULT_FEATURE, FEATURES

LAYER_IDS = np.array([0, 0, 0, 4, 4])  # two layers of 3 and 2 tokens


@pytest.fixture
def latents():
    """(2 checkpoints, 5 tokens, 1 latent value)"""
    return np.array([[1, 2, 6, 10, 20], [0, 0, 0, -1, 1]], np.float64)[:, :, None]


def test_token_mean_is_the_mean_over_all_tokens(latents):
    np.testing.assert_allclose(FEATURES["token_mean"](latents, LAYER_IDS), [[39 / 5], [0]], rtol=1e-6)


def test_layer_mean_std_stand_side_by_side_for_each_layer(latents):
    expected = [[3, np.sqrt(14 / 3), 15, 5], [0, 0, 0, 1]]  # deviations of 1, 2, 6 from 3: 4 + 1 + 9 over 3
    np.testing.assert_allclose(FEATURES["layer_mean_std"](latents, LAYER_IDS), expected, rtol=1e-6)


def test_layer_statistics_add_quantiles(latents):
    features = FEATURES["layer_statistics_of_latents"](latents, LAYER_IDS)
    # mean, std, then 1, 25, 50, 75, 99 %, linear between the sorted values
    first = [3, np.sqrt(14 / 3), 1.02, 1.5, 2, 4, 5.92]
    second = [15, 5, 10.1, 12.5, 15, 17.5, 19.9]
    np.testing.assert_allclose(features[0], [*first, *second], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "width"), [("token_mean", 3), ("layer_mean_std", 12), ("layer_statistics_of_latents", 42)]
)
def test_tensors_and_arrays_give_the_same_float32_rows(name, width):
    latents = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    from_tensor = FEATURES[name](latents, torch.from_numpy(LAYER_IDS))
    assert from_tensor.shape == (4, width)
    assert from_tensor.dtype == np.float32
    np.testing.assert_array_equal(from_tensor, FEATURES[name](latents.numpy(), LAYER_IDS))


@pytest.mark.parametrize("name", FEATURES)
def test_a_checkpoint_changes_only_its_own_row(name):
    before = np.random.default_rng(0).normal(size=(4, 5, 3))
    after = before.copy()
    after[2] += np.arange(5)[:, None]  # not a plain shift, so the spread changes too
    changed = (FEATURES[name](before, LAYER_IDS) != FEATURES[name](after, LAYER_IDS)).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_the_default_feature_exists_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"latents have shape \(2, 4, 3\) and layer_ids \(5,\)"):
        FEATURES[DEFAULT_FEATURE](np.zeros((2, 4, 3)), LAYER_IDS)


@pytest.fixture
def weights():
    return {
        "a.weight": torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 8.0]]]),
        "a.bias": np.array([[5.0], [-1.0]]),
        "a.num_batches_tracked": torch.tensor([7, 9]),
    }


def test_weight_features_are_the_floating_tensors_flattened(weights):
    np.testing.assert_array_equal(weight_features(weights), [[1, 2, 3, 4, 5], [0, 0, 0, 8, -1]])


def test_layer_statistics_keep_weights_and_biases_apart(weights):
    expected = [2.5, 1.25, 1.03, 1.75, 2.5, 3.25, 3.97, 5, 0, 5, 5, 5, 5, 5]
    statistics = layer_statistics(weights)
    assert statistics.shape == (2, 14)
    np.testing.assert_allclose(statistics[0], expected, rtol=1e-6)


def test_layer_statistics_of_a_group_are_taken_together(weights):
    together = layer_statistics(weights, groups=[["a.weight", "a.bias"]])
    np.testing.assert_allclose(together[0], [3, 2, 1.04, 2, 3, 4, 4.96], rtol=1e-6)
    with pytest.raises(ValueError, match=r"groups name b\.bias"):
        layer_statistics(weights, groups=[["b.bias"]])


def test_stacks_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"stacks of \[2, 3\] checkpoints"):
        weight_features({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})


def rank_two_tokens(seed: int, checkpoints: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (checkpoints, 3, 5) of rank 2 at each position, of rank 5 together; the last value of token 1 is padding."""
    bases = np.random.default_rng(7).normal(size=(3, 2, 5))
    mask = np.ones((3, 5), bool)
    mask[1, 4] = False
    codes = np.random.default_rng(seed).normal(size=(checkpoints, 3, 2))
    return np.einsum("bnk,nkd->bnd", codes, bases).astype(np.float32) * mask + 0.5 * mask, mask


def test_token_pca_is_exact_on_unseen_tokens_once_components_reach_the_rank():
    (train, mask), (unseen, _) = rank_two_tokens(0), rank_two_tokens(1)
    exact = token_pca(train, mask, components=2).reconstruct(unseen)
    np.testing.assert_allclose(exact, unseen, atol=1e-5)
    assert r2_score_masked(unseen, token_pca(train, mask, components=1).reconstruct(unseen), mask) < 0.95


def test_a_pca_per_position_beats_a_shared_one_that_is_exact_only_at_full_size():
    (train, mask), (unseen, _) = rank_two_tokens(0), rank_two_tokens(1)
    shared = token_pca(train, mask, components=2, per_position=False).reconstruct(unseen)
    assert r2_score_masked(unseen, shared, mask) < 0.95
    np.testing.assert_allclose(token_pca(train, mask, 5, per_position=False).reconstruct(unseen), unseen, atol=1e-5)


def test_token_pca_ignores_what_stands_in_padding():
    train, mask = rank_two_tokens(0)
    dirty = np.where(mask, train, 1e3 * np.random.default_rng(3).normal(size=train.shape))
    clean = token_pca(train, mask, 2).reconstruct(train)
    np.testing.assert_array_equal(token_pca(dirty, mask, 2).reconstruct(dirty), clean)
    assert (clean[:, ~mask] == 0).all()


def test_r2_counts_real_values_only_against_their_mean():
    tokens, mask = np.array([[[1.0, 99.0]], [[3.0, -99.0]]]), np.array([[True, False]])
    reconstruction = np.array([[[1.5, 0.0]], [[3.0, 0.0]]])
    assert r2_score_masked(tokens, reconstruction, mask) == pytest.approx(1 - 0.25 / 2)
    assert r2_score_masked(tokens, reconstruction, mask, mean=0.0) == pytest.approx(1 - 0.25 / 10)


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_nearest_distance_is_to_the_closest_reference(chunk_size):
    references = np.array([[0.0, 0.0], [10.0, 0.0]])
    queries = np.array([[3.0, 4.0], [10.0, 1.0], [10.0, 1e-9]])
    np.testing.assert_allclose(nearest_distances(queries, references, chunk_size), [5, 1, 1e-9], rtol=1e-9)


def test_nearest_distance_keeps_the_digits_of_a_near_copy():
    reference = np.full((1, 1000), 100.0)
    near = reference.copy()
    near[0, 3] += 1e-6  # squares of 1e7 would swallow 1e-12
    np.testing.assert_allclose(nearest_distances(near, reference), [1e-6], rtol=1e-3)


def test_noise_has_the_asked_size_for_every_value():
    anchors, std = torch.tensor([[0.0, 5.0], [100.0, 105.0]]), torch.tensor([1.0, 3.0])
    made = noise_around(anchors, std, strength=0.5, count=4000, generator=torch.Generator().manual_seed(0))
    noise = made - anchors[torch.arange(4000) % 2]
    torch.testing.assert_close(noise.std(0), torch.tensor([0.5, 1.5]), rtol=0.05, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), rtol=0, atol=0.1)


def test_averages_are_means_of_distinct_anchors():
    anchors = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    made = average_anchors(anchors, count=50, subset_size=2, generator=torch.Generator().manual_seed(0))
    assert set(made.flatten().tolist()) == {1.5, 2.5, 3.0}
    with pytest.raises(ValueError, match="subset_size is 4, expected 1 to 3"):
        average_anchors(anchors, 1, 4, torch.Generator())
