"""Networks of a zoo that already do well on some labelled samples: what a generated network has to be better than."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

from hub_scripts.evaluation.functional import batched_logits

LOWEST_LOG_PROBABILITY = -30.0


class Retrieved(NamedTuple):
    """The network chosen for each prompt.

    Args:
        rows (`torch.Tensor` of shape `(prompts,)`): int64, which of the networks.
        outputs (`torch.Tensor` of shape `(prompts, num_classes)`): int64, the output of it that stands for each class.
    """

    rows: torch.Tensor
    outputs: torch.Tensor


@torch.no_grad()
def retrieve(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    match: bool,
) -> Retrieved:
    """For each prompt the network with the most hits on its samples; the surest among equals.

    Args:
        module (`nn.Module`): the architecture.
        tensors (`Mapping[str, torch.Tensor]`): stacked networks to choose from, each `(networks, *shape)`.
        images (`torch.Tensor` of shape `(prompts, samples, channels, height, width)`): samples.
        labels (`torch.Tensor` of shape `(prompts, samples)`): int64.
        match (`bool`): True gives the outputs of each network to the classes that they fit best on the samples, by the
            Hungarian method; False leaves output `i` to class `i`.
    """
    rows, outputs = [], []
    for own, numbers in zip(images, labels, strict=True):
        logits = batched_logits(module, tensors, own)  # (networks, samples, outputs)
        size = logits.shape[-1]
        sure = logits.log_softmax(-1).nan_to_num(LOWEST_LOG_PROBABILITY).clamp(min=LOWEST_LOG_PROBABILITY)
        hits = F.one_hot(logits.argmax(-1), size).double()
        # log-probabilities of all samples together weigh less than one hit
        values = hits + sure / (1 - LOWEST_LOG_PROBABILITY * len(own))
        gains = torch.einsum("sc,nso->nco", F.one_hot(numbers, size).double(), values).numpy()
        chosen = [linear_sum_assignment(gain, maximize=True)[1] if match else np.arange(size) for gain in gains]
        scores = [gain[np.arange(size), order].sum() for gain, order in zip(gains, chosen, strict=True)]
        best = int(np.argmax(scores))
        rows.append(best)
        outputs.append(torch.from_numpy(chosen[best]))
    return Retrieved(torch.tensor(rows), torch.stack(outputs).long())
