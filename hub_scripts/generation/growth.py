"""Networks of a new architecture out of networks of an old one: wider, deeper, with other kernels.

Where it is possible the new networks compute what the old ones do (Net2Net, Chen, Goodfellow and Shlens 2016, arXiv 1511.05641; new
residual blocks end in a norm of weight zero, Goyal et al. 2017, arXiv 1706.02677). Nothing is promised: the outputs of both are
compared, and the report says how much they differ.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hub_scripts.evaluation.functional import batched_logits, condition_norms
from hub_scripts.generation.layer_matching import Architecture, Layer
from hub_scripts.generation.unit_maps import GrowthPlan, UnitMaps, plan_growth
from tokenization_sane import SymmetrySpec
from tokenization_sane.layout_sane import TensorSpec

TOLERANCE = 1e-4  # relative change of the outputs that float32 may make

COPIED, WIDENED, NARROWED, KERNEL_RESIZED = "copied", "widened", "narrowed", "kernel resized"
IDENTITY, SILENT, INSERTED, INITIALISED = (
    "identity inserted",
    "inserted with output zero",
    "inserted as a copy",
    "initialised",
)


@dataclass(frozen=True)
class LayerOrigin:
    """Where one layer comes from.

    Args:
        layer (`str`): in the target.
        source (`str`, *optional*): layer of the source whose values it has.
        how (`tuple[str, ...]`): `"copied"`, or some of `"widened"`, `"narrowed"` and `"kernel resized"`; for new layers one of
            `"identity inserted"`, `"inserted with output zero"`, `"inserted as a copy"` and `"initialised"` (as the target
            module is).
    """

    layer: str
    source: str | None
    how: tuple[str, ...]


@dataclass(frozen=True)
class GrowthReport:
    """What became of the layers, and of the function.

    Args:
        layers (`tuple[LayerOrigin, ...]`): one for each layer of the target that holds weights.
        dropped (`tuple[str, ...]`): layers of the source that have no place.
        max_change (`float`): largest relative change of a network's outputs on the images; NaN if an output is not finite.
    """

    layers: tuple[LayerOrigin, ...]
    dropped: tuple[str, ...]
    max_change: float

    @property
    def is_function_preserving(self) -> bool:
        """True if the outputs differ by rounding alone."""
        return self.max_change < TOLERANCE


@torch.no_grad()
def grow_networks(
    tensors: Mapping[str, torch.Tensor],
    source: nn.Module,
    source_spec: SymmetrySpec,
    target: nn.Module,
    target_spec: SymmetrySpec,
    images: torch.Tensor,
    tie_noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, torch.Tensor], GrowthReport]:
    """Map networks of one architecture to another one of the same family.

    Wider: units are copied, and what reads them takes a share of each copy. Narrower: units with the largest weights stay. Larger
    kernels have zeros around, smaller ones are cut out of the middle. Deeper: new layers hand on what they read, or add nothing
    where something runs beside them; norms among them take their statistics from the images.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): stacked tensors of the old networks, each `(networks, *shape)`; aligned with each
            other, if the new ones shall be.
        source (`nn.Module`): their architecture; its weights are not used.
        source_spec ([`SymmetrySpec`]): its symmetries.
        target (`nn.Module`): the new architecture; its weights are used where a layer has no source.
        target_spec ([`SymmetrySpec`]): its symmetries.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): float32, training images of the task, some dozens.
        tie_noise (`float`): standard deviation, in that of each tensor, of noise on the weights that read copies of one unit. It
            cancels, so the function stays, but training moves the copies apart. Without it copies get the same gradients.
        generator (`torch.Generator`, *optional*): of the noise; one draw for all networks, so that they stay aligned.

    Returns:
        `tuple[dict[str, torch.Tensor], GrowthReport]`: stacked floating tensors of the target, each `(networks, *shape)` float32,
        and what was done.

    Raises:
        ValueError: If there is no sensible mapping (another family, inputs or classes), if a tensor is missing, or if the target
            does not run on the images.
    """
    old, new = (
        Architecture(copy.deepcopy(module).eval(), spec, images)
        for module, spec in ((source, source_spec), (target, target_spec))
    )
    tensors = _canonical(tensors, old)
    plan = plan_growth(new, old)
    for architecture in (old, new):
        if architecture.failure is not None:
            raise ValueError(
                f"{architecture.kind} does not run on images of shape {tuple(images.shape[1:])}: {architecture.failure}"
            ) from architecture.failure
    build = _Builder(new, old, plan, tensors, tie_noise, generator)
    grown = {name: tensor for layer in new.layers.values() for name, tensor in build.layer(layer).items()}
    for layer in new.layers.values():
        if build.is_identity_norm(layer):
            grown |= _transparent_norm(layer, condition_norms(new.module, grown, images), grown)
    grown |= {alias: grown[name] for alias, name in new.ties.items() if name in grown}
    used = {*plan.pairs.values()}
    report = GrowthReport(
        tuple(build.origin(layer) for layer in new.layers.values()),
        tuple(name for name in old.layers if name not in used),
        _change(batched_logits(old.module, tensors, images), batched_logits(new.module, grown, images)),
    )
    return grown, report


def _canonical(tensors: Mapping[str, torch.Tensor], source: Architecture) -> dict[str, torch.Tensor]:
    """The tensors in float32, under the names that the architecture knows; tied ones once."""
    aliases: dict[str, list[str]] = {}
    for alias, name in source.ties.items():
        aliases.setdefault(name, []).append(alias)
    found = {}
    for layer in source.layers.values():
        for spec in layer.tensors.values():
            name = next((n for n in (spec.name, *aliases.get(spec.name, [])) if n in tensors), None)
            if name is None or tuple(tensors[name].shape[1:]) != spec.shape:
                shape = "missing" if name is None else f"of shape {tuple(tensors[name].shape)}"
                expected = ", ".join(["networks", *map(str, spec.shape)])
                raise ValueError(f"{spec.name} is {shape}, {source.kind} expects ({expected}) among the tensors.")
            found[spec.name] = tensors[name].float()
    return found


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest relative change of a network's outputs `(networks, images, classes)`."""
    before, after = before.double().flatten(1), after.double().flatten(1)
    return float(((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-300)).max())


class _Builder:
    """Makes the tensors of the target, layer by layer."""

    def __init__(
        self,
        target: Architecture,
        source: Architecture,
        plan: GrowthPlan,
        tensors: Mapping[str, torch.Tensor],
        tie_noise: float,
        generator: torch.Generator | None,
    ):
        self.target, self.source, self.plan, self.tensors = target, source, plan, tensors
        self.maps = UnitMaps(target, source, plan.origins, tensors)
        self.tie_noise, self.generator = tie_noise, generator
        self.networks = len(next(iter(tensors.values())))
        self.state = target.module.state_dict()
        # a silent layer is silenced by its norm where it has one, so that it has gradients itself
        self.muted = {n for n in plan.silent if not any(x.follows == n and _scale(x) for x in target.layers.values())}
        self.muted |= {x.name for x in target.layers.values() if x.follows in plan.silent and _scale(x)}
        handed = [target.layers[name] for name in plan.identities]
        axes = [(s, axis) for x in handed for s in x.tensors.values() for axis in (x.read_axis(s), x.write_axis(s))]
        self.passing = {group.name for s, axis in axes for group, _ in target.units(s, axis)}

    def layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Its tensors, each `(networks, *shape)`."""
        donor = self.plan.pairs.get(layer.name) or self.plan.donors.get(layer.name)
        if layer.name in self.plan.identities or self._is_transparent(layer):
            made = {spec.name: self._identity(layer, own, spec) for own, spec in layer.tensors.items()}
        elif donor is not None:
            theirs = self.source.layers[donor].tensors
            made = {spec.name: self._mapped(layer, spec, theirs[own]) for own, spec in layer.tensors.items()}
        else:
            made = {spec.name: self._initial(spec) for spec in layer.tensors.values()}
        if layer.name in self.muted:
            quiet = ("weight", "bias") if layer.kind == "norm" else layer.tensors
            for name in (spec.name for own, spec in layer.tensors.items() if own in quiet):
                made[name] = torch.zeros_like(made[name])
        return made

    def origin(self, layer: Layer) -> LayerOrigin:
        """What was done to it."""
        name = layer.name
        donor = self.plan.pairs.get(name) or self.plan.donors.get(name)
        if name in self.plan.identities or self._is_transparent(layer):
            return LayerOrigin(name, None, (IDENTITY,))
        if name not in self.plan.pairs:
            return LayerOrigin(name, donor, (SILENT if name in self.muted else INSERTED if donor else INITIALISED,))
        how, theirs = set(), self.source.layers[donor].tensors
        for own, spec in layer.tensors.items():
            for axis, (new, old) in enumerate(zip(spec.shape, theirs[own].shape, strict=True)):
                if new != old:
                    is_kernel = layer.is_kernel_axis(spec, axis)
                    how.add(KERNEL_RESIZED if is_kernel else WIDENED if new > old else NARROWED)
        return LayerOrigin(name, donor, tuple(sorted(how)) or (COPIED,))

    # --- one tensor
    def _initial(self, spec: TensorSpec) -> torch.Tensor:
        return self.state[spec.name].float().expand(self.networks, *spec.shape).clone()

    def _mapped(self, layer: Layer, spec: TensorSpec, other: TensorSpec) -> torch.Tensor:
        values = self.tensors[other.name]
        std = values.flatten(1).std(1, correction=0)
        for axis, size in enumerate(spec.shape):
            if layer.is_kernel_axis(spec, axis):
                values = _resized(values, axis + 1, size)
                continue
            index, shares = self.maps.along(spec, other, axis)
            values = values.index_select(axis + 1, index)
            if axis == layer.read_axis(spec) and len(index.unique()) < len(index):
                values = values * shares.view([-1 if at == axis + 1 else 1 for at in range(values.dim())])
                values = self._ties_broken(values, axis + 1, index, std)
        return values

    def _ties_broken(self, values: torch.Tensor, axis: int, index: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """Values plus noise whose sum over copies of one unit is zero."""
        if not self.tie_noise:
            return values
        noise = torch.randn(values.shape[1:], generator=self.generator).movedim(axis - 1, 0)
        _, copies, counts = index.unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), *noise.shape[1:]).index_add(0, copies, noise)
        noise -= sums[copies] / counts[copies].view(-1, *[1] * (noise.dim() - 1))
        scale = self.tie_noise * std.view(-1, *[1] * noise.dim())
        return values + scale * noise.movedim(0, axis - 1)

    # --- layers that hand on what they read
    def is_identity_norm(self, layer: Layer) -> bool:
        """True for new norms that undo themselves, given statistics."""
        return layer.kind == "norm" and self._is_transparent(layer)

    def _is_transparent(self, layer: Layer) -> bool:
        """True for new layers that hold one slice for each unit, where these units are handed on."""
        if layer.name in self.plan.pairs or layer.name in self.muted:
            return False
        if not (layer.is_depthwise or (layer.kind == "norm" and "running_var" in layer.tensors)):
            return False
        groups = {group.name for group, _ in self.target.units(layer.largest, 0)}
        handed = self.passing if layer.name in self.plan.donors else self.plan.origins.keys()
        return not groups.isdisjoint(handed)

    def _identity(self, layer: Layer, own: str, spec: TensorSpec) -> torch.Tensor:
        values = torch.zeros(self.networks, *spec.shape)
        middle = (_middle_tap(layer, axis, size) for axis, size in enumerate(spec.shape[2:]))
        place = (*[slice(None)] * 3, *middle)
        if layer.kind == "norm":
            return values.fill_(own in ("weight", "running_var"))
        if layer.is_depthwise and len(spec.shape) > 1:
            values[place] = 1
        elif layer.read_axis(spec) is not None:
            matrix, columns = self.maps.handed_on(layer, spec)
            values[place] = matrix if layer.write_axis(spec) == 0 else matrix.T
            std = values.flatten(1).std(1, correction=0)
            values = self._ties_broken(values, layer.read_axis(spec) + 1, columns, std)
        return values


def _scale(layer: Layer) -> bool:
    """True for norms with a scale that can be zero."""
    return layer.kind == "norm" and "weight" in layer.tensors


def _middle_tap(layer: Layer, axis: int, size: int) -> int:
    """Index in a kernel of the input that stands where the output does."""
    padding, dilation = layer.module.padding, layer.module.dilation[axis]
    if isinstance(padding, str):
        return (size - 1) // 2 if padding == "same" else 0
    return min(padding[axis] // dilation, size - 1)


def _resized(values: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Kernels with zeros on both sides of an axis, or cut out of its middle."""
    before = values.shape[axis]
    if size <= before:
        return values.narrow(axis, (before - size) // 2, size)
    resized = values.new_zeros([size if at == axis else length for at, length in enumerate(values.shape)])
    resized.narrow(axis, (size - before) // 2, before).copy_(values)
    return resized


def _transparent_norm(
    layer: Layer, conditioned: Mapping[str, torch.Tensor], grown: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A norm with the statistics of what it reads, and the scale and shift that undo them."""
    names = {own: spec.name for own, spec in layer.tensors.items()}
    mean, variance = (conditioned[names[own]] for own in ("running_mean", "running_var"))
    made = {names["running_mean"]: mean, names["running_var"]: variance}
    if _scale(layer):
        made |= {names["weight"]: (variance + layer.module.eps).sqrt(), names["bias"]: mean.clone()}
        return made
    return {name: grown[name] for name in made}  # nothing could undo the statistics
