"""Loss between what decoded networks and their originals say about images of the task (arXiv 2503.17138)."""

from collections.abc import Sequence

import numpy as np
import torch

from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import batched_logits, behavioural_loss, with_image_norms
from hub_scripts.training.parts import Part


class Behaviour:
    """Runs some networks of each batch, decoded and original; of several parts, another one at each step.

    Args:
        parts (`Sequence[tuple[int, Part, Codec]]`): number, part and codec of those whose networks can be run.
        networks (`int`): networks of a batch that are run.
        images (`int`): images of the task's train split that they are run on.
        seed (`int`): of the choice of images.
        device (`torch.device`): where.
    """

    def __init__(
        self, parts: Sequence[tuple[int, Part, Codec]], networks: int, images: int, seed: int, device: torch.device
    ):
        self.networks, self.images, self.seed = networks, images, seed
        self._parts = [
            (number, codec, with_image_norms(part.zoo.module).to(device), part.zoo.whole_task.images["train"].to(device),
             codec.layout.value_mask.to(device))
            for number, part, codec in parts
        ]  # fmt: skip

    def __call__(
        self, reconstruction: torch.Tensor, labels: torch.Tensor, part: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Loss of the first networks of a part in a batch.

        Args:
            reconstruction (`torch.Tensor` of shape `(batch, tokens, token_size)`): decoded tokens.
            labels (`torch.Tensor` of shape `(batch, tokens, token_size)`): the original ones.
            part (`torch.Tensor` of shape `(batch,)`): number of the part that each is from.
            step (`int`): chooses part and images.
        """
        number, codec, module, images, mask = self._parts[step % len(self._parts)]
        rows = (part == number).nonzero().flatten()[: self.networks]
        if not len(rows):  # a batch without such a network; the graph must be the same for all processes
            return 0.0 * reconstruction.sum()
        size = codec.layout.num_tokens
        rng = np.random.default_rng([self.seed, step])
        chosen = torch.from_numpy(rng.choice(len(images), min(self.images, len(images)), replace=False))
        with torch.no_grad():
            original = batched_logits(module, codec.tensors(labels[rows, :size]), images[chosen])
        decoded = codec.tensors(reconstruction[rows, :size].float() * mask)
        return behavioural_loss(batched_logits(module, decoded, images[chosen]), original)
