"""Forward and training step of the models against timm and Hugging Face transformers, interleaved in one run.

    python benchmarks/model_step.py [--quick] [--device cpu|cuda] [--compile] [--dtype float32|bfloat16]

Same machine, process, batch, dtype, memory format, attention kernel (SDPA) and exact GELU; eager stands against
eager, compiled against compiled. Every model returns logits; ours is called with tokens=False, its call for logits
alone. The last line printed is one JSON object: the lowest ratio over the models (above 1: we are faster), and how many
peers import.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a checkout, with torch, numpy and safetensors alone
from vit_model import build_model, forward_macs, variant
from vit_model.config import ViTConfig

QUICK_SECONDS = 45.0  # of the 60 that --quick may take; the rest is the import of the peers and reserve
BUILD_SECONDS = 4.0  # to build the contestants of a model and to take their memory
CPU_TIME = "--cpu-time"
Forward = Callable[[Tensor], Tensor]
TIMM_NAMES = {
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "R50+B/16": "vit_base_r50_s16_224",
}


def import_peers() -> dict[str, Any]:
    """timm and transformers as far as they import; the second attempt is for a CUDA torchvision on a CPU torch."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        importlib.import_module("torchvision")
    peers: dict[str, Any] = {}
    for name in ("timm", "transformers"):
        try:
            peers[name] = importlib.import_module(name)
        except ImportError as error:
            print(f"{name} is not here ({error}): pip install -e .[bench]")
    return peers


def build(name: str, config: ViTConfig, peers: dict[str, Any]) -> dict[str, tuple[nn.Module, Forward]]:
    ours = build_model(config, 1000)
    found: dict[str, tuple[nn.Module, Forward]] = {"ours": (ours, lambda x: ours(x, tokens=False).logits)}
    if "timm" in peers:
        theirs = peers["timm"].create_model(TIMM_NAMES[name], num_classes=1000)
        found["timm"] = (theirs, theirs)
    if "transformers" in peers and config.stem is None:
        values = {"hidden_size": config.width, "num_hidden_layers": config.depth, "num_labels": 1000}
        values |= {"num_attention_heads": config.num_heads, "intermediate_size": config.mlp_dim}
        hf_config = peers["transformers"].ViTConfig(**values, attn_implementation="sdpa")
        hf = peers["transformers"].ViTForImageClassification(hf_config)
        found["hf"] = (hf, lambda x: hf(x).logits)
    return found


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes kept for the backward pass besides the parameters: the activation memory, on any device."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # a freed address could come back and be counted once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def measure(
    contestants: dict[str, tuple[nn.Module, Forward]], x: Tensor, y: Tensor, rounds: int, seconds: float, least: int = 2
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step of every contestant, in turn; the first round warms up and is not kept.

    At least `least` rounds are kept; after these none begins that would not end within `seconds`.
    """
    times: dict[str, dict[str, list[float]]] = {
        mode: {name: [] for name in contestants} for mode in ("forward", "train")
    }
    start = time.perf_counter()
    for i in range(rounds + 1):
        round_start = time.perf_counter()
        order = list(contestants) if i % 2 else list(reversed(contestants))  # nobody is always first
        for name in order:
            model, forward = contestants[name]
            model.eval()
            with torch.inference_mode():
                forward_time = timed(partial(forward, x), x.device)
            model.train()
            train_time = timed(partial(train_step, forward, x, y), x.device)
            model.zero_grad(set_to_none=True)
            if i:
                times["forward"][name].append(forward_time)
                times["train"][name].append(train_time)
        now = time.perf_counter()
        if i >= least and now - start + (now - round_start) > seconds:
            break
    return times


def train_step(forward: Forward, x: Tensor, y: Tensor) -> None:
    torch.autograd.backward(F.cross_entropy(forward(x).float(), y))


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    clock = time.process_time if CPU_TIME in sys.argv else time.perf_counter
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(forward: Forward, model: nn.Module, x: Tensor, y: Tensor) -> int:
    """CUDA: the peak of an eager training step above the weights; CPU: what it keeps for the backward pass."""
    model.train()
    if x.device.type == "cuda":
        train_step(forward, x, y)  # the libraries take their workspaces in the first step, whoever comes first
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # the weights of all contestants
        train_step(forward, x, y)
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() - before
    kept = saved_bytes(lambda: forward(x), model)
    model.zero_grad(set_to_none=True)
    return kept


def run_model(name: str, args: argparse.Namespace, peers: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    config = variant(name)
    assert isinstance(config, ViTConfig)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    contestants = {
        key: (model.to(device, dtype), forward) for key, (model, forward) in build(name, config, peers).items()
    }
    x = torch.randn(args.batch, 3, 224, 224, device=device, dtype=dtype)
    y = torch.randint(0, 1000, (args.batch,), device=device)
    memory = {key: peak_memory(forward, model, x, y) for key, (model, forward) in contestants.items()}
    if args.compile:
        contestants = {key: (model, torch.compile(forward)) for key, (model, forward) in contestants.items()}
    times = measure(contestants, x, y, args.rounds, args.seconds, 1 if args.quick else 2)
    result: dict[str, Any] = {
        "memory_bytes": memory,
        "images_per_second": {},
        "ratio": {},
        "rounds": len(times["train"]["ours"]),
    }
    for mode, values in times.items():
        median = {key: statistics.median(seconds) for key, seconds in values.items()}
        result["images_per_second"][mode] = {key: args.batch / seconds for key, seconds in median.items()}
        # Of the rounds' own ratios: what slows the machine for a while slows both sides of a round.
        result["ratio"][mode] = {
            key: statistics.median(b / a for a, b in zip(values["ours"], seconds, strict=True))
            for key, seconds in values.items()
            if key != "ours"
        }
    result["train_tflops"] = 6 * forward_macs(config) * result["images_per_second"]["train"]["ours"] / 1e12
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends within 60 s")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", default=None, choices=["float32", "bfloat16"], help="default: float32, on cuda bfloat16"
    )
    parser.add_argument("--batch", type=int, default=None, help="images per step; default 8 on cpu, 128 on cuda")
    parser.add_argument("--rounds", type=int, default=15, help="at most; every round runs all contestants")
    parser.add_argument("--seconds", type=float, default=60.0, help="per model, after which no new round begins")
    parser.add_argument("--compile", action="store_true", help="torch.compile for everybody")
    parser.add_argument("--models", nargs="+", default=list(TIMM_NAMES), choices=list(TIMM_NAMES))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(CPU_TIME, action="store_true", help="CPU seconds, not wall clock: where others use the machine")
    args = parser.parse_args()
    start = time.perf_counter()
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        parser.error("--cpu-time measures one thread of a CPU; add --device cpu --threads 1")
    cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.batch = args.batch or (128 if cuda else 1 if args.quick else 8)
    if args.quick:
        args.rounds = 6
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = import_peers()
    how = "compiled" if args.compile else "eager"
    print(
        f"torch {torch.__version__}, {args.device}, {args.dtype}, batch {args.batch}, {torch.get_num_threads()} threads"
    )
    how += ", CPU seconds" if args.cpu_time else ""
    print(f"{how}, contiguous NCHW, SDPA, exact GELU; peers: {describe(peers)}")
    results = {}
    for i, name in enumerate(args.models):
        if args.quick:
            left = QUICK_SECONDS - (time.perf_counter() - start)
            args.seconds = left / (len(args.models) - i) - BUILD_SECONDS
        results[name] = run_model(name, args, peers)
        report(name, results[name])
        gc.collect()
    summary: dict[str, Any] = {"peers": len(peers)}
    for mode in ("forward", "train"):
        for key in ("hf", "timm"):
            if ratios := [result["ratio"][mode][key] for result in results.values() if key in result["ratio"][mode]]:
                summary[f"{mode}_vs_{key}"] = round(min(ratios), 3)
    folder = Path("bench-results")
    folder.mkdir(exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key != "models"}
    content = {"settings": settings, "torch": torch.__version__, "peers": describe(peers), "models": results}
    (folder / "model_step.json").write_text(json.dumps(content, indent=2))
    print(json.dumps(summary))


def describe(peers: dict[str, Any]) -> str:
    found = []
    for name in peers:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(name)
    return ", ".join(found) or "none"


def report(name: str, result: dict[str, Any]) -> None:
    for mode in ("forward", "train"):
        speeds = "  ".join(f"{key} {value:8.2f}" for key, value in result["images_per_second"][mode].items())
        ratios = "  ".join(f"vs {key} {value:.2f}" for key, value in result["ratio"][mode].items())
        print(f"{name:9} {mode:8} images/s  {speeds}   {ratios}   ({result['rounds']} rounds)")
    print(
        f"{name:9} memory   MiB       "
        + "  ".join(f"{key} {value / 2**20:8.1f}" for key, value in result["memory_bytes"].items())
    )


if __name__ == "__main__":
    main()
