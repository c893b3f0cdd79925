"""Images per second in training and in inference, beside those of other implementations.

    python experiments/throughput.py                               # all that this machine can do
    python experiments/throughput.py --sections unet2d profile     # parts of it
    OMP_NUM_THREADS=1 python experiments/throughput.py --threads 1 --clock cpu    # on a machine that others use

Sections:

- ``unet2d``: our ``UNet2D`` against diffusers' ``UNet2DModel`` as its users run it (float32, eager, AdamW and
  EMAModel at their defaults), of the same architecture and parameters, 32x32, 64 to 128 channels, batch 8;
- ``ddpmpp``: our DDPM++ of the CIFAR-10 preset, batch 4, against the reference implementation, of which
  ``--reference`` names a checkout, or without one against figures of it;
- ``profile``: where our training step spends its time, and which fraction of the measured peak it reaches;
- ``convolutions``: single 3x3 convolutions and their derivatives, torch's and those of training (bfloat16 only);
- ``loss``: whether 200 steps in the default precision have the losses of 200 steps in float32;
- ``gpu``: DDPM++ in bfloat16, channels_last and CUDA graphs, against diffusers (not without a GPU).

The default job (8x8 digits) is ``experiments/versions.py``'s.

Auto precision is the default of training; sampling has it with ``sampling.precision=auto`` and is in float32
by default, for which the inference of the rows in float32 stands.

The sides take turns, after warm-up; times are medians, ± the distance of their quartiles. Ours keep what memory they
have freed, as our command line does, the others' return it, as Python does by itself; so each turn begins with
``--settle`` steps that do not count.
A training step is forward, backward, optimizer and moving average of the weights. Peak memory is that of a
process of its own per side. Results go to ``experiments/results/throughput_<machine>.md`` and ``.json``, those of
some sections to files of their own.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench import Bench, Side
from reference_ddpmpp import reference_ddpmpp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sde_diffusion.allocator import keep_freed_memory, return_freed_memory
from sde_diffusion.data import load_dataset
from sde_diffusion.devices import choose_precision
from sde_diffusion.ema import EMA
from sde_diffusion.networks import channels_last as fast_layout
from sde_diffusion.networks import conv_weights, winograd
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.networks.unet2d import UNet2D
from sde_diffusion.presets import preset
from sde_diffusion.score import frozen_weights_in
from sde_diffusion.tensors import expand
from sde_diffusion.training_settings import TrainingSettings

UNET2D: dict[str, Any] = {  # 8,952,067 parameters
    "sample_size": 32,
    "block_out_channels": (64, 128, 128, 128),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
DDPM_CIFAR10: dict[str, Any] = {  # 35.7 million parameters, the architecture of google/ddpm-cifar10-32
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
REFERENCE_DDPMPP = {"train": 3.9, "infer": 11.0}  # images/s in float32, batch 4, 2 cores: a given figure
BFLOAT16, CPU = torch.bfloat16, torch.device("cpu")


def inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images, steps and noise."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, batch, 3, 32, 32, generator=generator).to(device).unbind(0)
    return x, torch.randint(0, 1000, (batch,), generator=generator).to(device), noise


def ours(
    make: Callable[[], nn.Module],
    batch: int,
    *,
    name: str = "ours",
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    channels_last: bool = False,
    graphs: bool = False,
) -> Side:
    """A network of ours, trained as the trainer does; ``dtype`` None for the default of the device."""
    keep_freed_memory()
    torch.manual_seed(0)
    dtype = choose_precision("auto", device) if dtype is None else dtype
    last = channels_last or fast_layout.preferred(device, dtype)  # as the trainer has it
    layout = torch.channels_last if last else torch.contiguous_format
    net = make().to(device, memory_format=layout)
    ema = EMA(net, 0.999)
    optimizer = TrainingSettings().build_optimizer(net)
    x, t, noise = inputs(batch, device)
    x, t = x.contiguous(memory_format=layout), t.float()
    precise = dtype == torch.float32
    if graphs:
        net.compile(mode="reduce-overhead")

    def autocast() -> Any:
        return nullcontext() if precise else torch.autocast(device.type, dtype=dtype)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            out = net(x, t)
        F.mse_loss(out.float(), noise).backward()
        optimizer.step()
        ema.update_parameters(net)

    # As a sampler does: the weights are cast before the first of its many evaluations.
    averaged = copy.deepcopy(ema.module)
    sampling = frozen_weights_in(averaged, dtype)
    sampling.__enter__()
    if graphs:
        averaged.compile(mode="reduce-overhead")

    def infer(_: Any = sampling) -> Any:
        with torch.no_grad(), autocast():
            return averaged(x, t)

    return Side(name, batch, train, infer, keep_freed_memory)


def theirs(
    arguments: dict[str, Any],
    batch: int,
    *,
    name: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Side:
    """diffusers' network with the optimizer and moving average of its training examples."""
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    net = UNet2DModel(**arguments).to(device)
    averaged = UNet2DModel(**arguments).to(device).eval()
    ema = EMAModel(net.parameters())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    x, t, noise = inputs(batch, device)

    def autocast() -> Any:
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)

    def train() -> None:
        with autocast():
            out = net(x, t).sample
        F.mse_loss(out.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())

    def infer() -> Any:
        with torch.no_grad(), autocast():
            return averaged(x, t).sample

    return Side(name, batch, train, infer)


def ddpmpp(**changes: Any) -> nn.Module:
    """DDPM++ at its CIFAR-10 config."""
    return NCSNpp(**{**preset("ddpmpp_cifar10_vp").arguments, **changes})


CPU_SIDES: dict[str, Callable[[], Side]] = {
    "diffusers float32": lambda: theirs(UNET2D, 8),
    "ours, auto precision": lambda: ours(lambda: UNet2D(**UNET2D), 8),
    "ours, freed memory returned": lambda: replace(
        ours(lambda: UNet2D(**UNET2D), 8), allocate=return_freed_memory
    ),
    "ours float32": lambda: ours(lambda: UNet2D(**UNET2D), 8, dtype=torch.float32),
    "DDPM++ ours, auto precision": lambda: ours(ddpmpp, 4),
    "DDPM++ ours float32": lambda: ours(ddpmpp, 4, dtype=torch.float32),
}


def peak_memory(name: str, threads: int) -> float:
    """Of two training steps in a process of their own, in MiB."""
    command = [sys.executable, __file__, "--memory-of", name, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak_memory(name: str) -> None:
    """The process of :func:`peak_memory`."""
    side = CPU_SIDES[name]()
    side.allocate()
    side.train()
    side.train()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def on_cpu(
    bench: Bench, title: str, names: list[str], threads: int, first: list[Side] | None = None
) -> dict[str, dict[str, float]]:
    """Compares some of :data:`CPU_SIDES`, with others before them."""
    sides = list(first or [])
    for name in names:
        side = CPU_SIDES[name]()
        sides.append(replace(side, name=name))
    return bench.compare(title, sides, {name: peak_memory(name, threads) for name in names})


# ---------------------------------------------------------------------------------------------------- sections


def unet2d(bench: Bench, threads: int) -> None:
    """Against diffusers."""
    names = [
        "diffusers float32",
        "ours, auto precision",
        "ours, freed memory returned",
        "ours float32",
    ]
    on_cpu(bench, "UNet2D, 8,952,067 parameters, 32x32, batch 8", names, threads)


def against_reference(bench: Bench, threads: int, folder: Path | None) -> None:
    """DDPM++ against the reference implementation, or without a checkout of it against what it once did."""
    names = ["DDPM++ ours float32", "DDPM++ ours, auto precision"]
    title = "DDPM++ at its CIFAR-10 config, batch 4"
    if folder is not None:
        steps = reference_ddpmpp(folder, *inputs(4, CPU))
        on_cpu(bench, title, names, threads, [Side("reference float32", 4, *steps)])
        return
    rows = on_cpu(bench, title, names, threads)
    if threads != 2 or bench.now is time.process_time:
        bench.say("", "No ratio to the reference, whose figures are for 2 threads by the wall clock.")
        return
    for key, figure in REFERENCE_DDPMPP.items():
        rate = rows["DDPM++ ours, auto precision"][f"{key}_images_per_second"]
        rows["DDPM++ ours, auto precision"][f"{key}_ratio_to_reference"] = rate / figure
        bench.say(f"- {key}: {rate / figure:.2f} times the reference's {figure} images/s (float32, 2 cores)")


def peaks(bench: Bench) -> dict[str, float]:
    """The most GFLOP/s that a product of matrices and a convolution reach here, by precision."""
    found = {}
    for dtype in (torch.float32, BFLOAT16):
        a, x = torch.randn(1024, 1024, dtype=dtype), torch.randn(8, 128, 32, 32, dtype=dtype)
        w = torch.randn(128, 128, 3, 3, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        (product,) = bench.alternate([lambda a=a: a @ a])  # type: ignore[misc]
        found[f"matrix {name}"] = 2 * 1024**3 / product / 1e9
        for layout, images in (("", x), (" channels last", x.contiguous(memory_format=torch.channels_last))):
            (convolution,) = bench.alternate([lambda x=images, w=w: F.conv2d(x, w, padding=1)])  # type: ignore[misc]
            found[f"convolution {name}{layout}"] = 2 * x.numel() * 128 * 9 / convolution / 1e9
    return found


def profiled(bench: Bench, rows: int = 15) -> None:
    """Where the training step of ``unet2d`` goes."""
    side = CPU_SIDES["ours, auto precision"]()
    (seconds,) = bench.alternate([side.train])
    # Products are counted as convolutions and attention as they stand have them, whatever runs in their place.
    plain = torch.backends.nnpack.flags(enabled=False), patch.object(fast_layout, "available", lambda: False)
    with plain[0], plain[1], FlopCounterMode(display=False) as counter:
        side.train()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        side.train()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    limits = peaks(bench)
    rate = counter.get_total_flops() / seconds / 1e9
    best = max(limits.values())
    bench.say("", "## Where a training step of UNet2D goes (ours, default precision)", "")
    bench.say(
        f"- peaks measured, GFLOP/s: {', '.join(f'{name} {value:.0f}' for name, value in limits.items())}"
    )
    bench.say(f"- the step: {rate:.0f} GFLOP/s, {100 * rate / best:.0f}% of the highest of them", "")
    bench.say("| operation | % | calls |", "|---|---|---|")
    table = {event.key: 100 * event.self_cpu_time_total / total for event in events[:rows]}
    for event in events[:rows]:
        bench.say(f"| {event.key} | {table[event.key]:.1f} | {event.count} |")
    bench.results["profile"] = {"peaks": limits, "gflops": rate, "fraction": rate / best, "operations": table}


CONVOLUTIONS = (  # images, channels in and out, side
    (8, 64, 64, 32), (8, 128, 128, 16), (8, 256, 128, 16), (8, 128, 128, 8), (8, 128, 128, 4),
    (4, 256, 256, 16), (64, 48, 48, 28), (64, 96, 96, 14), (128, 32, 32, 8), (128, 64, 64, 4),
)  # fmt: skip


def convolutions(bench: Bench) -> None:
    """Convolutions and their derivatives by the image and by the weights: torch's, and those of training."""
    bench.say("", "## 3x3 convolutions in bfloat16, ms by torch and by us", "")
    if not fast_layout.available() or not conv_weights.available():
        bench.say("Not here: no bfloat16 in this processor, or no compiler.")
        return
    bench.say(
        "| images, channels, pixels | values | | by the image | | by the weights | | all, times faster |"
    )
    bench.say("|---|---|---|---|---|---|---|---|")
    rows, ones = {}, [1, 1]
    for images, into, out, side in CONVOLUTIONS:
        x, grad = (
            torch.randn(images, channels, side, side).to(BFLOAT16, memory_format=torch.channels_last)
            for channels in (into, out)
        )
        weight = torch.randn(out, into, 3, 3).to(BFLOAT16, memory_format=torch.channels_last)
        back = partial(
            torch.ops.aten.convolution_backward,
            *(grad, x, weight, [out], ones, ones, ones, False, [0, 0], 1),
        )
        theirs_ = [
            partial(F.conv2d, x, weight, padding=1),
            partial(back, [True, False, False]),
            partial(back, [False, True, True]),
        ]
        if winograd.pays(weight):
            by_weight = partial(winograd.weight_gradient, x, grad)
            by_image = partial(winograd.derivative_by_image, grad, weight)
            ours_ = [partial(winograd.convolve, x, weight), by_image, by_weight]
        else:
            ours_ = [*theirs_[:2], partial(conv_weights.weight_gradient, x, grad)]
        steps = [step for pair in zip(theirs_, ours_, strict=True) for step in pair]
        times = [1e3 * seconds for seconds in bench.alternate(steps, before=steps)]
        name, faster = f"{images}, {into} to {out}, {side} x {side}", sum(times[::2]) / sum(times[1::2])
        rows[name] = {"torch": times[::2], "ours": times[1::2], "faster": faster}
        bench.say(f"| {name} | {' | '.join(f'{value:.2f}' for value in times)} | {faster:.2f} |")
    bench.results["convolutions"] = rows


def losses(steps: int, seed: int, dtype: torch.dtype) -> Tensor:
    """The losses of training a narrow UNet2D on enlarged digits, (steps,)."""
    torch.manual_seed(seed)
    narrow = {**UNET2D, "block_out_channels": (32, 64, 64), "in_channels": 1, "out_channels": 1}
    narrow |= {key: UNET2D[key][:3] for key in ("down_block_types",)}
    narrow |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    net = UNet2D(**narrow)
    data = load_dataset("digits").train.float() / 8 - 1
    images = F.interpolate(data, scale_factor=4.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4, fused=True)
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        index = torch.randint(len(images), (8,), generator=generator)
        t, noise = torch.rand(8, generator=generator), torch.randn(8, 1, 32, 32, generator=generator)
        alpha = expand((0.5 * torch.pi * t).cos(), noise)
        x = alpha * images[index] + (1 - alpha**2).sqrt() * noise
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=BFLOAT16, enabled=dtype == BFLOAT16):
            out = net(x, 999 * t)
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def loss_curves(bench: Bench, steps: int) -> None:
    """The default precision against float32: the same data and noise twice, and other data and noise."""
    fast = choose_precision("auto", CPU)
    precise = [losses(steps, seed, torch.float32) for seed in (0, 1)]
    same = losses(steps, 0, fast)
    bench.say("", f"## Loss curves over {steps} steps: {fast} against float32", "")
    bench.say("| steps | float32 | fast | float32, other seed | standard error |", "|---|---|---|---|---|")
    rows = []
    for part in range(4):
        piece = slice(part * steps // 4, (part + 1) * steps // 4)
        means = [float(curve[piece].mean()) for curve in (precise[0], same, precise[1])]
        error = float(precise[0][piece].std() / len(precise[0][piece]) ** 0.5)
        rows.append([*means, error])
        values = " | ".join(f"{value:.4f}" for value in rows[-1])
        bench.say(f"| {piece.start}-{piece.stop} | {values} |")
    distance = max(abs(row[1] - row[0]) / row[3] for row in rows[1:])
    bench.results["loss curves"] = {"rows": rows, "largest_distance_in_standard_errors": distance}
    bench.say("", f"The largest distance after the first quarter is {distance:.2f} standard errors.")


def gpu(bench: Bench) -> None:
    """DDPM++ and diffusers' network on a GPU."""
    device = torch.device("cuda")
    fast: dict[str, Any] = {"device": device, "dtype": BFLOAT16, "channels_last": True}
    side = 8192
    a = torch.randn(side, side, device=device, dtype=BFLOAT16)
    (seconds,) = bench.alternate([lambda: a @ a])
    peak = 2 * side**3 / seconds
    bench.say("", f"bfloat16 matrix peak measured: {peak / 1e12:.0f} TFLOP/s")
    for batch in (128, 512):
        contestants: dict[str, Callable[[], Side]] = {
            "diffusers float32": lambda: theirs(DDPM_CIFAR10, batch, device=device),  # noqa: B023
            "diffusers bfloat16": lambda: theirs(DDPM_CIFAR10, batch, dtype=BFLOAT16, device=device),  # noqa: B023
            "ours, same architecture": lambda: ours(lambda: UNet2D(**DDPM_CIFAR10), batch, **fast),  # noqa: B023
            "the same, CUDA graphs": lambda: ours(
                lambda: UNet2D(**DDPM_CIFAR10),
                batch,  # noqa: B023
                graphs=True,
                **fast,
            ),
            "DDPM++": lambda: ours(ddpmpp, batch, **fast),  # noqa: B023
            "DDPM++, CUDA graphs": lambda: ours(ddpmpp, batch, graphs=True, **fast),  # noqa: B023
            "DDPM++, checkpointing": lambda: ours(
                lambda: ddpmpp(checkpointing=True),
                batch,  # noqa: B023
                **fast,
            ),
        }
        memory, sides = {}, []
        for name, make in contestants.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            made = make()
            sides.append(replace(made, name=name))
            made.train()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows = bench.compare(f"GPU, batch {batch}", sides, memory)
        with FlopCounterMode(display=False) as counter:
            sides[4].train()
        flops = counter.get_total_flops() / batch
        for name in ("DDPM++", "DDPM++, CUDA graphs"):
            fraction = flops * rows[name]["train_images_per_second"] / peak
            rows[name]["fraction_of_peak"] = fraction
            bench.say(f"- {name}: {100 * fraction:.0f}% of the matrix peak in training")


# -------------------------------------------------------------------------------------------------------- main


def machine() -> str:
    """The processor's name, and the GPU's."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def main() -> None:
    """The command line."""
    sections = ("unet2d", "ddpmpp", "profile", "convolutions", "loss", "gpu")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--settle", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--reference", type=Path, help="a checkout of score_sde_pytorch, to run beside ours")
    parser.add_argument("--loss-steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.memory_of:
        print_peak_memory(options.memory_of)
        return
    bench = Bench(options.repeats, options.warmup, options.settle, options.clock)
    bench.say(f"# Throughput on {machine()}", "")
    bench.say(f"torch {torch.__version__}, {options.threads} threads, {options.clock} clock")
    run: dict[str, Callable[[], None]] = {
        "unet2d": lambda: unet2d(bench, options.threads),
        "ddpmpp": lambda: against_reference(bench, options.threads, options.reference),
        "profile": lambda: profiled(bench),
        "loss": lambda: loss_curves(bench, options.loss_steps),
        "convolutions": lambda: convolutions(bench),
        "gpu": lambda: gpu(bench),
    }
    for name in options.sections:
        if name != "gpu" or torch.cuda.is_available():
            run[name]()
    options.out.mkdir(parents=True, exist_ok=True)
    label = "".join(c if c.isalnum() else "_" for c in f"{platform.node()} {machine()}")
    if set(options.sections) != set(sections):  # beside the others
        label = "_".join([label, *options.sections])
    about = {"machine": machine(), "node": platform.node(), "torch": torch.__version__}
    about |= {"threads": options.threads, "clock": options.clock, "repeats": options.repeats}
    path = options.out / f"throughput_{label}"
    path.with_suffix(".json").write_text(json.dumps({**about, "results": bench.results}, indent=1))
    path.with_suffix(".md").write_text("\n".join(bench.lines) + "\n")
    print(f"\nwritten: {path}.md and .json")


if __name__ == "__main__":
    main()
