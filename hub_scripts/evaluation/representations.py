"""What probes read: representations of a zoo's checkpoints from SANE, and the baselines, each under one name.

Whatever is fitted (normalisation, prototypes, random features) is fitted on the train split. A representation is a list of groups of
features; probes may weigh groups differently, see `ridge_probes`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import torch
from sklearn.kernel_approximation import Nystroem
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm.auto import tqdm

from hub_scripts.evaluation.baselines import layer_statistics, network_statistics, weight_features
from hub_scripts.evaluation.embedder import Embedder
from hub_scripts.evaluation.features import FEATURES
from hub_scripts.evaluation.layer_profiles import weight_profile
from hub_scripts.evaluation.moments import layer_moments, network_moments
from hub_scripts.evaluation.prototypes import Prototypes
from hub_scripts.zoos.alignment import unaligned
from hub_scripts.zoos.tasks import SPLITS
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import SaneModel
from tokenization_sane import LayerLayout

DEFAULT = "sane"
BASELINES = ("weights", "weights_aligned", "layer_statistics", "layer_statistics_joint")
NAMES = (
    *(
        DEFAULT,
        "sane_latents",
        "sane_token_mean",
        "sane_layer_mean_std",
        "sane_random",
        "sane_moments",
        "sane_responses",
    ),
    *(*BASELINES, "layer_statistics_lifted", "spectra", "sane_and_layer_statistics"),
)
LIFT = 300  # random features of a kernel
OUTLIER = 5.0  # standard deviations at which standardised moments are cut before the kernel
FLOOR = 1e-6  # of norms whose logarithm is taken: biases may start at zero
CHUNK = 128  # checkpoints read at a time

Splits = dict[str, np.ndarray]  # by split, (checkpoints, features)
Groups = list[Splits]


class Representations:
    """All representations of the checkpoints of a zoo of one layout, of all splits and epochs.

    * `sane`: the default. Four groups: `sane_latents`; `sane_moments`; the same lifted by a Nyström approximation of an RBF
      kernel, so that a linear probe can bend; and `sane_responses`, where the networks can be run.
    * `sane_latents`: how the latents of each layer are distributed, in canonical order. `sane_token_mean` is the paper's
      embedding, `sane_layer_mean_std` mean and deviation of each latent in each layer, `sane_random` what an encoder with
      random weights gives in place of `sane_latents`.
    * `sane_moments`: moments of the weights, see `moments.py`; no encoder is needed for them.
    * `sane_responses`: what the network says about prototypes, see `prototypes.py`.
    * `weights`, `weights_aligned`: all weights, before and after alignment. `layer_statistics` is s(W), weights and biases
      apart; `layer_statistics_joint` describes a layer's weights and biases together; `layer_statistics_lifted` is a control: s(W)
      beside what the kernel of `sane` makes of it.
    * `spectra`: what WeightWatcher measures of each layer, see `layer_profiles.py`: logarithms of norm, standard deviation,
      spectral norm and stable rank, and the exponent of the spectrum. It is Hill's, whether or not `powerlaw` is installed,
      which takes two hundred times as long: minutes for a thousand small networks.
    * `sane_and_layer_statistics`: both, for completeness.

    Args:
        zoo ([`Zoo`]): of one layout.
        embedder ([`Embedder`]): the model to look at.
        first_epoch (`int`): prototypes are made by networks of the train split from this epoch on.
        seed (`int`): of prototypes, kernels and the random encoder.
        names (`Sequence[str]`): those that are needed.
    """

    def __init__(
        self, zoo: Zoo, embedder: Embedder, first_epoch: int = 1, seed: int = 0, names: Sequence[str] = NAMES
    ):
        self.zoo, self.embedder, self.seed = zoo, embedder, seed
        self.weights = {split: zoo.stacked(split) for split in SPLITS}
        self.epochs = {split: zoo.column(split, "epoch") for split in SPLITS}
        self._fit_rows = np.flatnonzero(self.epochs["train"] >= first_epoch)
        self.prototypes = self.fit_prototypes(zoo, first_epoch, seed)
        self.groups = self._all(names)

    @staticmethod
    def fit_prototypes(zoo: Zoo, first_epoch: int = 1, seed: int = 0) -> Prototypes | None:
        """Prototypes from the networks of the train split; None if they cannot be run."""
        if not zoo.can_run:
            return None
        tensors = zoo.stacked("train", np.flatnonzero(zoo.column("train", "epoch") >= first_epoch))
        images = zoo.whole_task.images["train"]
        num_classes = zoo.info.get("classes_per_network") or zoo.whole_task.num_classes
        return Prototypes.fit(zoo.module, tensors, tuple(images.shape[1:]), num_classes, seed)

    def _all(self, wanted: Sequence[str]) -> dict[str, Groups]:
        """The wanted ones, in the order of `NAMES`; what several share is made once."""
        kind = self.embedder.feature
        apart, joint = _tensor_groups(self.weights["train"])
        latents = cache(lambda: self._latents(self.embedder, (kind, "token_mean", "layer_mean_std")))
        moments = cache(lambda: self._each(layer_moments))
        responses = cache(lambda: [self._responses(self.prototypes)] if self.prototypes else [])
        statistics = cache(lambda: [self._each(layer_statistics, groups=names) for names in apart if names])
        sane = cache(lambda: [latents()[kind], moments(), self._lifted([moments()]), *responses()])
        made: dict[str, Callable[[], Groups]] = {
            DEFAULT: sane,
            "sane_latents": lambda: [latents()[kind]],
            "sane_token_mean": lambda: [latents()["token_mean"]],
            "sane_layer_mean_std": lambda: [latents()["layer_mean_std"]],
            "sane_random": lambda: [self._latents(self._untrained(), (kind,))[kind]],
            "sane_moments": lambda: [moments()],
            "sane_responses": responses,
            "weights": lambda: [self._unaligned()],
            "weights_aligned": lambda: [self._each(weight_features)],
            "layer_statistics": statistics,
            "layer_statistics_joint": lambda: [self._each(layer_statistics, groups=joint)],
            "layer_statistics_lifted": lambda: [*statistics(), self._lifted(statistics())],
            "spectra": lambda: [spectra(self.weights, self.zoo.layout.layers)],
            "sane_and_layer_statistics": lambda: [_joined(sane()), _joined(statistics())],
        }
        found = {name: made[name]() for name in NAMES if name in wanted}
        return {name: groups for name, groups in found.items() if groups}  # no responses where nothing runs

    def _untrained(self) -> Embedder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = SaneModel(self.embedder.model.config).eval()
        return Embedder(model, self.embedder.tokenizer, self.embedder.feature)

    def _each(self, function, **arguments) -> Splits:
        return {split: function(tensors, **arguments) for split, tensors in self.weights.items()}

    def _latents(self, embedder: Embedder, kinds: Sequence[str]) -> dict[str, Splits]:
        """Features of latents by kind; each network is encoded once."""
        found: dict[str, Splits] = {kind: {} for kind in kinds}
        layers = embedder.codec(self.zoo.layout).layout.layer_ids
        for split, tensors in self.weights.items():
            count, parts = len(self.epochs[split]), {kind: [] for kind in kinds}
            for start in tqdm(range(0, count, CHUNK), desc=f"embed {split}", unit="batch", leave=False):
                part = {name: values[start : start + CHUNK] for name, values in tensors.items()}
                latents = embedder.latents(part, self.zoo.layout)
                for kind in kinds:
                    parts[kind].append(FEATURES[kind](latents, layers))
            for kind in kinds:
                found[kind][split] = np.concatenate(parts[kind])
        return found

    def _responses(self, prototypes: Prototypes) -> Splits:
        module = self.zoo.module
        return {
            split: np.concatenate(prototypes.responses(module, tensors), axis=1)
            for split, tensors in self.weights.items()
        }

    def _lifted(self, groups: Groups) -> Splits:
        """Random features whose products approximate an RBF kernel of standardised features (Williams and Seeger 2001)."""
        x = _joined(groups)
        fitted = StandardScaler().fit(x["train"][self._fit_rows])
        x = {split: np.clip(fitted.transform(part), -OUTLIER, OUTLIER) for split, part in x.items()}
        count = min(LIFT, len(self._fit_rows))
        kernel = Nystroem(gamma=0.1 / x["train"].shape[1], n_components=count, random_state=self.seed)
        kernel.fit(x["train"][self._fit_rows])
        return {split: kernel.transform(part) for split, part in x.items()}

    def _unaligned(self) -> Splits:
        """Weights as training left them, where the zoo says how they were aligned."""
        found = {}
        for split, tensors in self.weights.items():
            rows = self.zoo.rows(split)
            draws = rows["alignment_permutations"][:] if "alignment_permutations" in rows.column_names else [None]
            if all(draw is None for draw in draws) or not self.zoo.has_symmetries:
                found[split] = weight_features(tensors)
                continue
            undone = []
            for row, draw in enumerate(draws):
                state_dict = {name: values[row] for name, values in tensors.items()}
                state_dict = unaligned(self.zoo.symmetries, state_dict, draw)
                undone.append(weight_features({name: value[None] for name, value in state_dict.items()}))
            found[split] = np.concatenate(undone)
        return found


def spectra(weights: Mapping[str, Mapping[str, torch.Tensor]], layers: Sequence[LayerLayout]) -> Splits:
    """Size and spectrum of each layer, `spectra` of [`Representations`].

    Columns that miss a value in the train split are dropped: not every layer has a matrix, or one with enough eigenvalues. What
    other splits miss beyond that gets the mean of the train split.
    """
    found = {split: _layer_spectra(tensors, layers) for split, tensors in weights.items()}
    kept = ~np.isnan(found["train"]).any(0)
    mean = found["train"][:, kept].mean(0)
    return {split: np.where(np.isnan(part[:, kept]), mean, part[:, kept]) for split, part in found.items()}


def _layer_spectra(tensors: Mapping[str, torch.Tensor], layers: Sequence[LayerLayout]) -> np.ndarray:
    """Five figures of each layer, `(checkpoints, layers * 5)`; NaN where there is none."""
    columns = []
    for layer in layers:
        profile = weight_profile(tensors, layer, fit="hill")
        norm, std, largest = (np.log(np.maximum(profile[name], FLOOR)) for name in ("norm", "std", "spectral_norm"))
        columns += [norm, std, largest, 2 * (norm - largest), profile["alpha"]]
    return np.stack(columns, axis=1)


def _joined(groups: Groups) -> Splits:
    return {split: np.concatenate([group[split] for group in groups], axis=1) for split in SPLITS}


def transferable(
    weights: Mapping[str, Mapping[str, torch.Tensor]], prototypes: Prototypes | None, module: nn.Module | None
) -> dict[str, Groups]:
    """Representations that networks of any architecture have, for probes that are used on another zoo: `sane` and s(W).

    Args:
        weights (`Mapping[str, Mapping[str, torch.Tensor]]`): stacked networks by split.
        prototypes ([`Prototypes`], *optional*): of their zoo; what is said of them does not tell the classes apart.
        module (`nn.Module`, *optional*): their architecture; needed with prototypes.
    """
    groups: dict[str, Groups] = {DEFAULT: [{split: network_moments(tensors) for split, tensors in weights.items()}]}
    if prototypes is not None:
        groups[DEFAULT].append({split: prototypes.responses(module, t)[1] for split, t in weights.items()})
    groups["layer_statistics"] = [{split: network_statistics(tensors) for split, tensors in weights.items()}]
    return groups


def _tensor_groups(tensors: Mapping[str, torch.Tensor]) -> tuple[list[list[list[str]]], list[list[str]]]:
    """Names of floating tensors: matrices and vectors, each alone; and those of each module together."""
    names = [name for name, values in tensors.items() if values.is_floating_point()]
    apart = [[[n] for n in names if (tensors[n].ndim > 2) == is_matrix] for is_matrix in (True, False)]
    joint: dict[str, list[str]] = {}
    for name in names:
        joint.setdefault(name.rpartition(".")[0], []).append(name)
    return apart, list(joint.values())
