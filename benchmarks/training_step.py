"""One training step of the named variants: images/s, memory and MFU, beside timm's model in the same loop.

    python benchmarks/training_step.py --device cuda
Needs torch, numpy and safetensors alone, not ray, mlflow or webdataset; timm is a peer where it is installed. The step
is that of `train.precision: bf16_pure` in few lines, for both sides: forward, backward, clip, AdamW on fp32 copies.
`mfu_measured` is 6 x MACs x images/s over the best bf16 rate of an 8192^3 product in this process (2048^3 on a CPU),
`mfu_peak` over the data sheet. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from vit_model import build_model, forward_macs, variant

MODELS = ("Ti/16", "S/16", "B/16", "L/16", "H/14")
TIMM = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "H/14": "vit_huge_patch14_224",
}
BATCH = {"Ti/16": 1024, "S/16": 512, "B/16": 256, "L/16": 128, "H/14": 64}  # On a device of 80 GB.
PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}  # Data sheets, dense bf16.
CLASSES = 1000


class Step:
    """Pure bf16 with fp32 copies, as `train.precision: bf16_pure`, or fp32; clipping at 1 and fused AdamW."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor], device: torch.device, pure: bool) -> None:
        self.model, self.forward, self.pure = model, forward, pure
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [nn.Parameter(parameter.detach().float().clone()) for parameter in own] if pure else own
        if pure:
            model.to(torch.bfloat16)
        self.own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3, weight_decay=0.1, fused=True)
        self.device = device

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        pixels = images.to(torch.float32).sub_(127.5).div_(127.5)
        logits = self.forward(pixels.bfloat16() if self.pure else pixels).float()
        loss = F.cross_entropy(logits, labels)
        torch.autograd.backward(loss)
        with torch.no_grad():
            gradients = [parameter.grad.float() for parameter in self.own if parameter.grad is not None]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            torch._foreach_mul_(gradients, (1.0 / (norm + 1e-6)).clamp(max=1.0))
            for master, gradient in zip(self.masters, gradients, strict=True):
                master.grad = gradient
            self.optimizer.step()
            if self.pure:
                torch._foreach_copy_([p.data for p in self.own], [p.data for p in self.masters])
        for parameter in (*self.own, *self.masters):
            parameter.grad = None
        return loss.detach()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_rate(device: torch.device) -> float:
    """FLOP/s of the best of 20 bf16 products of two square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(20):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2.0 * side**3 / (time.perf_counter() - started))
    return best


def contestants(name: str, args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Step]]:
    """One after the other: nothing of the second is on the device while the memory of the first is measured."""
    pure = args.dtype == "bfloat16"
    ours = build_model(variant(name, gelu=args.gelu), CLASSES, seed=0, device=device).train()
    if args.compile:
        ours.compile()
    yield "ours", Step(ours, lambda x: ours(x, tokens=False).logits, device, pure)
    try:
        import timm
    except Exception as error:  # A torchvision that does not fit torch fails with other errors than ImportError.
        print(f"without timm: {type(error).__name__}: {error}")
        return
    theirs = timm.create_model(TIMM[name], num_classes=CLASSES).to(device).train()
    if args.compile:
        theirs.compile()
    yield "timm", Step(theirs, theirs, device, pure)


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Steps of every contestant in turn, in rounds; the medians of what a round takes."""
    batch = args.batch or (BATCH[name] if device.type == "cuda" else 2)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    result: dict[str, Any] = {"batch": batch, "images_per_second": {}, "peak_gib": {}}
    seconds: dict[str, list[float]] = {}
    steps: dict[str, Step] = {}
    cuda = device.type == "cuda"
    others = torch.cuda.memory_allocated(device) if cuda else 0
    for key, step in contestants(name, args, device):
        steps[key] = step
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(args.warm_up):
            step(images, labels)
        synchronize(device)
        if cuda:
            result["peak_gib"][key] = (torch.cuda.max_memory_allocated(device) - others) / 2**30
            others = torch.cuda.memory_allocated(device)
        seconds[key] = []
    deadline = time.perf_counter() + args.seconds
    for number in range(args.rounds):
        for key in list(steps) if number % 2 else reversed(list(steps)):
            synchronize(device)
            started = time.perf_counter()
            for _ in range(args.steps):
                step_loss = steps[key](images, labels)
            synchronize(device)
            seconds[key].append((time.perf_counter() - started) / args.steps)
        if number >= 2 and time.perf_counter() > deadline:
            break
    assert bool(step_loss.isfinite())
    for key, each in seconds.items():
        result["images_per_second"][key] = batch / statistics.median(each)
    if "timm" in seconds:
        ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["timm"], strict=True)]
        result["vs_timm"] = statistics.median(ratios)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends within 60 s: Ti/16 on a CPU, B/16 on a GPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="default: bfloat16 on cuda")
    parser.add_argument("--models", nargs="+", default=None, choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--gelu", default="exact", choices=["exact", "tanh"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=None, help="a round; default 20 on cuda, 1 on a CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="a model, after which no round begins")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    device = torch.device(args.device)
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.compile = cuda if args.compile is None else args.compile
    args.steps = args.steps or (20 if cuda else 1)
    args.warm_up = 10 if cuda else 1
    if args.quick:
        args.models = args.models or (["B/16"] if cuda else ["Ti/16"])
        args.rounds, args.seconds = 3, 10.0
    args.models = args.models or (list(MODELS) if cuda else ["Ti/16", "S/16"])
    if args.threads:
        torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    rate = best_rate(device)
    peak = next((peak for key, peak in PEAK.items() if key in name), None) if cuda else None
    print(f"torch {torch.__version__}, {name}, {args.dtype}, {'compiled' if args.compile else 'eager'}")
    print(f"best bf16 product {rate / 1e12:.2f} TFLOP/s" + (f", data sheet {peak / 1e12:.0f}" if peak else ""))
    results: dict[str, Any] = {}
    for model in args.models:
        made = measure(model, args, device)
        flops = 6.0 * forward_macs(variant(model), CLASSES) * made["images_per_second"]["ours"]
        made["mfu_measured"] = flops / rate
        if peak is not None:
            made["mfu_peak"] = flops / peak
        results[model] = made
        speeds = "  ".join(f"{key} {speed:,.1f}" for key, speed in made["images_per_second"].items())
        memory = "  ".join(f"{key} {gib:.1f} GiB" for key, gib in made["peak_gib"].items())
        ratio = f"  vs timm {made['vs_timm']:.2f}" if "vs_timm" in made else ""
        print(f"{model:6} batch {made['batch']:5}  images/s {speeds}{ratio}  mfu {made['mfu_measured']:.3f}  {memory}")
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    folder = Path("bench-results")
    folder.mkdir(exist_ok=True)
    content = {"settings": vars(args), "torch": torch.__version__, "device": name, "best_rate": rate, "models": results}
    (folder / "training_step.json").write_text(json.dumps(content, indent=2))
    summary = {
        f"mfu_measured_{model.replace('/', '')}": round(made["mfu_measured"], 3) for model, made in results.items()
    }
    for model, made in results.items():
        if "vs_timm" in made:
            summary[f"vs_timm_{model.replace('/', '')}"] = round(made["vs_timm"], 3)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
