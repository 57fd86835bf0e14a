"""Where a run stands: step, time, learning rate, log; saved with each checkpoint, and when it is told to end."""

import math
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hub_scripts.outputs import read_json, write_json

LOG_FILE = "training_log.json"
POSITION_FILE = "position.json"  # of a checkpoint: where the run stood
MEGABYTE = 2**20


class Run:
    """One training run, which may be interrupted and go on.

    Args:
        args (`TrainArguments`): of the run.
        accelerator (`Accelerator`): its processes.
        num_checkpoints (`int`): samples in an epoch.
    """

    def __init__(self, args: Any, accelerator: Accelerator, num_checkpoints: int):
        self.args, self.accelerator = args, accelerator
        self.max_steps = args.max_steps or args.epochs * (num_checkpoints // args.batch_size)
        self.step, self.seconds_before, self.history = 0, 0.0, []
        self.started = time.perf_counter()
        self.seconds = self.saved_at = 0.0
        self.is_told_to_end = False
        self._speed = (0.0, 0, 0)  # seconds, samples and tokens of the last entry of the log
        self.samples = self.tokens = 0
        self._has_signal = False

    def __enter__(self) -> "Run":
        """SIGTERM, as schedulers send it before they kill, ends the run after the step, with a checkpoint."""

        def told(*_: Any) -> None:
            self._has_signal = True

        self._before = signal.signal(signal.SIGTERM, told)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end, whichever of steps and minutes is nearer to its end."""
        by_time = self.seconds / (60 * self.args.max_minutes) if self.args.max_minutes else 0.0
        return min(1.0, max(self.step / self.max_steps, by_time))

    @property
    def finished(self) -> bool:
        """True if steps or minutes are over."""
        return self.progress >= 1.0

    @property
    def should_save(self) -> bool:
        """True if a checkpoint is due after this step."""
        by_time = self.args.save_minutes and self.seconds - self.saved_at >= 60 * self.args.save_minutes
        return bool(self.step % self.args.save_steps == 0 or by_time or self.finished or self.is_told_to_end)

    def advance(self, optimizer: torch.optim.Optimizer, samples: int, tokens: int) -> None:
        """Count a step and set the learning rate of the next one.

        Args:
            optimizer (`torch.optim.Optimizer`): whose learning rate it is.
            samples (`int`): checkpoints that all processes read in the step.
            tokens (`int`): their tokens.
        """
        self.step += 1
        self.samples += samples
        self.tokens += tokens
        # one clock for all processes, and one word: they must agree on learning rate, checkpoints and the last step
        now = [self.seconds_before + time.perf_counter() - self.started, float(self._has_signal)]
        if self.accelerator.num_processes > 1:
            told = torch.tensor(now, dtype=torch.float64, device=self.accelerator.device)
            now = self.accelerator.reduce(told, "sum").tolist()
            now[0] /= self.accelerator.num_processes
        self.seconds, self.is_told_to_end = now[0], now[1] > 0
        self.set_learning_rate(optimizer)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Linear warm-up, then a cosine to zero, over the run's progress."""
        warmup = self.args.warmup_ratio
        at = max(self.progress, 1 / self.max_steps)
        scale = at / warmup if at < warmup else 0.5 * (1 + math.cos(math.pi * (at - warmup) / max(1e-9, 1 - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = self.args.learning_rate * scale

    def log(self, losses: dict[str, float], scores: dict[str, float]) -> None:
        """Add an entry to the log and to the trackers: losses of the last step, scores, speed since the last entry, memory."""
        seconds, samples, tokens = self._speed
        passed = max(self.seconds - seconds, 1e-9)
        entry = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            **losses,
            **scores,
            "samples_per_second": (self.samples - samples) / passed,
            "tokens_per_second": (self.tokens - tokens) / passed,
            "memory_mb": _memory(self.accelerator.device),
        }
        self._speed = (self.seconds, self.samples, self.tokens)
        self.history.append(entry)
        self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=self.step)
        if self.accelerator.is_main_process:
            write_json(Path(self.args.output_dir) / LOG_FILE, self.history)

    def save(self, output_dir: Path) -> None:
        """Write a checkpoint under another name first, then remove the oldest."""
        folder, partial = output_dir / f"step_{self.step:06d}", output_dir / f".step_{self.step:06d}.partial"
        try:
            self.accelerator.save_state(str(partial))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            position = {"step": self.step, "seconds": self.seconds, "history": self.history}
            write_json(partial / POSITION_FILE, position | {"num_processes": self.accelerator.num_processes})
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in sorted(output_dir.glob("step_*"))[: -self.args.save_total_limit]:
                shutil.rmtree(old)
        self.saved_at = self.seconds
        self.accelerator.wait_for_everyone()

    def load(self, output_dir: Path) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            ValueError: If it was saved by another number of processes.
        """
        found = sorted(output_dir.glob("step_*"))
        if not found:
            return
        position = read_json(found[-1] / POSITION_FILE)
        if position["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{found[-1]} was saved by {position['num_processes']} processes, this run has {self.accelerator.num_processes}; "
                "launch with as many as before."
            )
        self.accelerator.load_state(str(found[-1]))
        self.step, self.seconds_before, self.history = position["step"], position["seconds"], position["history"]
        self.started, self.seconds = time.perf_counter(), self.seconds_before
        self.saved_at = self.seconds
        self._speed = (self.seconds, 0, 0)


def _memory(device: torch.device) -> float:
    """Most memory used so far, in MB: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEGABYTE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on macOS bytes
    return peak / (MEGABYTE if sys.platform == "darwin" else 1024)
