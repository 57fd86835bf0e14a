"""Time, memory and traffic of training SANE on machines that were not here, computed from sizes and a stated throughput.

python benchmarks/simulate_training.py                          the tables of docs/simulation.md
python benchmarks/simulate_training.py --tflops 400 --mfu 0.4   for another device

FLOPs count matrix products, 6 for each parameter and token (2 forward, 4 backward), plus attention. Memory counts weights, gradients
and AdamW's moments (16 bytes a parameter with fp32 master weights), and what backward needs of each block. Links carry gradients
(DDP: ring all-reduce) or weights and gradients (FSDP: two gathers and one scatter).
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_scripts.outputs import write_json


@dataclass(frozen=True)
class Size:
    """A SANE and the zoo that it is trained on.

    Args:
        name (`str`): for the table.
        hidden (`int`): width of the blocks.
        layers (`int`): blocks of the encoder; the decoder has as many.
        token_size (`int`): values in a token.
        latent (`int`): values in a latent.
        window (`int`): tokens in a window.
        batch (`int`): windows in a step, over all devices; each is shown in two views.
        network_tokens (`int`): tokens of a network in the zoo.
        networks (`int`): checkpoints in the train split.
        epochs (`int`): windows of each checkpoint that are shown.
    """

    name: str
    hidden: int
    layers: int
    token_size: int
    latent: int
    window: int
    batch: int
    network_tokens: int
    networks: int
    epochs: int

    @property
    def parameters(self) -> int:
        """Weights of the blocks, embeddings and readouts."""
        return 2 * (12 * self.layers * self.hidden**2 + self.hidden * (self.token_size + self.latent))

    @property
    def tokens_per_step(self) -> int:
        """Both views."""
        return 2 * self.batch * self.window

    @property
    def flops_per_step(self) -> float:
        """Forward and backward."""
        attention = 2 * 2 * 2 * self.layers * self.window * self.hidden  # scores and values, encoder and decoder
        return self.tokens_per_step * (6 * self.parameters + 3 * attention)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.epochs * self.networks // self.batch


PAPER = Size("ResNet-18, the paper's size", 2048, 8, 288, 128, 256, 32, 38_960, 140_000, 50)
LARGE = Size("Hub-scale, 0.9 B parameters", 2048, 9, 288, 128, 512, 512, 400_000, 1_000_000, 10)


@dataclass(frozen=True)
class Device:
    """What a device can do; figures of its maker, and the share of them that is assumed to be reached.

    Args:
        tflops (`float`): dense bf16 peak, 10^12 a second.
        mfu (`float`): share of it that model FLOPs reach.
        memory (`float`): GB.
        link (`float`): GB a second of each device to the others, in one direction.
    """

    tflops: float
    mfu: float
    memory: float
    link: float


def activations(size: Size, devices: int, checkpointing: bool) -> float:
    """GB that backward needs on each device.

    About 34 bytes a token, channel and block in bf16 (Korthikanti et al. 2022, without attention scores, which are computed
    anew); with checkpointing the input of each block, and one block in full.
    """
    per_block = size.tokens_per_step / devices * size.hidden
    blocks = 2 * size.layers
    return (2 * blocks * per_block + 34 * per_block if checkpointing else 34 * blocks * per_block) / 1e9


def simulate(size: Size, device: Device, devices: int) -> dict[str, float]:
    """Figures of a run on so many devices."""
    size = replace(size, batch=max(size.batch, devices))  # a device has one window at least
    compute = size.flops_per_step / devices / (device.tflops * 1e12 * device.mfu)
    ring = 2 * (devices - 1) / devices
    ddp, fsdp = 4 * ring * size.parameters / 1e9, 1.5 * 2 * ring * size.parameters / 1e9  # fp32 gradients; bf16
    traffic = ddp / device.link
    # gradients travel while backward goes on, which is two thirds of the compute
    step = compute + max(0.0, traffic - 2 / 3 * compute)
    read = size.batch * size.window * size.token_size * 4 / 1e6
    return {
        "devices": devices,
        "step_seconds": step,
        "hours": step * size.steps / 3600,
        "ddp_gb_per_step": ddp,
        "fsdp_gb_per_step": fsdp,
        "state_gb_ddp": 16 * size.parameters / 1e9,
        "state_gb_fsdp": 16 * size.parameters / 1e9 / devices,
        "activations_gb": activations(size, devices, False),
        "activations_gb_checkpointing": activations(size, devices, True),
        "storage_mb_per_second": 2 * read / step,  # the permuted view reads about as much again
        "cache_tb": size.networks * size.network_tokens * size.token_size * 2 / 1e12,
    }


def table(size: Size, device: Device) -> tuple[str, list[dict[str, float]]]:
    """The figures for 1, 8 and 64 devices as markdown."""
    rows = [simulate(size, device, devices) for devices in (1, 8, 64)]
    lines = [
        f"**{size.name}**: {size.parameters / 1e6:,.0f} M parameters, {size.tokens_per_step:,} tokens a step in two views, "
        f"{size.flops_per_step / 1e12:.0f} TFLOP a step, {size.steps:,} steps; bf16 token cache {rows[0]['cache_tb']:.1f} TB.",
        "",
        "| devices | step | whole run | weights and AdamW, DDP / FSDP | activations, kept / recomputed | traffic a step, DDP / FSDP | reads |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['devices']:.0f} | {row['step_seconds']:.2f} s | {row['hours']:,.0f} h | {row['state_gb_ddp']:.1f} / "
            f"{row['state_gb_fsdp']:.1f} GB | {row['activations_gb']:.1f} / {row['activations_gb_checkpointing']:.1f} GB | "
            f"{row['ddp_gb_per_step']:.1f} / {row['fsdp_gb_per_step']:.1f} GB | {row['storage_mb_per_second']:,.0f} MB/s |"
        )
    return "\n".join(lines), rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16 peak of the device, 10^12 a second")
    parser.add_argument("--mfu", type=float, default=0.45, help="share of the peak that is reached (assumed)")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of the device")
    parser.add_argument("--link", type=float, default=50.0, help="GB a second to the other devices")
    parser.add_argument("--out", help="where the figures go as JSON, beside the printed tables")
    args = parser.parse_args()
    device = Device(args.tflops, args.mfu, args.memory, args.link)
    found = {size.name: table(size, device) for size in (PAPER, LARGE)}
    print("\n\n".join(text for text, _ in found.values()))
    if args.out:
        write_json(args.out, {name: rows for name, (_, rows) in found.items()})


if __name__ == "__main__":
    main()
