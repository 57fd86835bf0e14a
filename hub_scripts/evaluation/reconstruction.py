"""How well a model reconstructs networks that it has not seen: their weights, and what they do."""

from typing import Any

import torch

from hub_scripts.codec import Codec, compression
from hub_scripts.evaluation.baselines import r2_score_masked, token_pca
from hub_scripts.evaluation.functional import accuracy, agreement, batched_logits, condition_norms
from hub_scripts.zoos.zoo import Zoo

NORM_IMAGES = 2000  # whose running statistics decoded networks get


@torch.no_grad()
def measure_reconstruction(zoo: Zoo, codec: Codec) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Weights of all test checkpoints, and the function of the last checkpoint of each test model.

    Args:
        zoo ([`Zoo`]): its test split is measured; its train split fits the PCA floor.
        codec ([`Codec`]): the model.

    Returns:
        `dict`: `compression` (real weight values per latent value), `r2`, `r2_pca` (the better of a PCA for each token
        position and one for all, with as many components as a latent has values), `accuracy_original`, `accuracy_decoded`
        (norms with running statistics of train images: decoded ones do not fit decoded weights), `agreement` (share of test
        images with the same prediction); and the tokens of the last checkpoints, `original` and `decoded`, each
        `(models, tokens, token_size)`.
    """
    layout, size = codec.layout, codec.model.config.latent_size
    tokens = codec.tokens(zoo.stacked("test"))
    decoded = codec.decode(codec.encode(tokens))
    train = codec.tokens(zoo.stacked("train"))
    floors = [
        token_pca(train, layout.value_mask, size, per_position=each).reconstruct(tokens) for each in (True, False)
    ]

    last = torch.from_numpy(zoo.last_rows("test"))
    images, labels = zoo.whole_task.images["test"], zoo.labels("test", "test", last.numpy())
    originals, networks = (codec.tensors(t[last]) for t in (tokens, decoded))
    networks = condition_norms(zoo.module, networks, zoo.whole_task.images["train"][:NORM_IMAGES])
    original_logits, decoded_logits = (batched_logits(zoo.module, t, images) for t in (originals, networks))
    figures = {
        "compression": compression([layout], size),
        "r2": r2_score_masked(tokens, decoded, layout.value_mask),
        "r2_pca": max(r2_score_masked(tokens, floor, layout.value_mask) for floor in floors),
        "accuracy_original": float(accuracy(original_logits, labels).mean()),
        "accuracy_decoded": float(accuracy(decoded_logits, labels).mean()),
        "agreement": float(agreement(original_logits, decoded_logits).mean()),
        "checkpoints": len(tokens),
        "models": len(last),
    }
    return figures, {"original": tokens[last], "decoded": decoded[last]}
