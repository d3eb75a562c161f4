"""`vit estimate RECIPE`: what a training will need and cost, before anything is rented. Nothing is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipelines.config import RecipeError, parse
from pipelines.progress import say
from pipelines.training.hardware import Hardware, find_hardware
from pipelines.workflow.stages import recipe_class

if TYPE_CHECKING:
    from vit_model import ModelConfig

__all__ = ["Estimate", "Size", "describe", "estimate", "main"]

KNOWN = {  # Images of the training split, classes. For recipes whose corpus nobody here can open.
    "imagenet": (1_281_167, 1000),
    "imagenet21k": (14_197_122, 21_843),
    "jft300m": (303_000_000, 18_291),
    "cifar10": (50_000, 10),
}
MFU = 0.45  # Share of the data sheet's rate; what is assumed until `benchmarks/training_step.py` has measured it.
DECODE_SECONDS = (
    1.14e-3  # Of one core for an ImageNet-sized JPEG with the wheels' decoder, as measured on a shared core.
)
OF_SUCH_JPEGS = frozenset({"imagenet", "imagenet21k", "jft300m"})
RECOMPUTED = 4 / 3  # Work of a step with activation checkpointing: one forward pass more.
FP32_SLOWER = 2.0  # fp32 weights are multiplied in TF32, at half the rate of bf16 by the data sheets.
DEVICES_OF_A_NODE = 8
RESERVE = 0.9  # Share of a device's memory that can be planned with; the rest goes to kernels and fragments.


@dataclass(frozen=True, slots=True)
class Size:
    """Of the corpus."""

    images: int
    classes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one recipe on so many devices of one kind."""

    parameters: int
    macs_per_image: int
    total_steps: int
    images_seen: int
    state_gib: float  # On each device, from step to step, with gradients.
    image_mib: float  # For each image that a device takes at once.
    fits: int  # Images that fit at once; 0: not even one.
    per_device: int  # Images of one step that fall to each device.
    step_seconds: float
    images_per_second: float
    days: float
    dollars: float

    @property
    def exaflops(self) -> float:
        return 6.0 * self.macs_per_image * self.images_seen / 1e18

    @property
    def decode_cores(self) -> float:
        """CPU cores that decode as fast as the devices train."""
        return self.images_per_second * DECODE_SECONDS


def estimate(recipe: Any, size: Size, hardware: Hardware, count: int, mfu: float, price: float | None) -> Estimate:
    """`recipe` is of pretrain or finetune; the mathematics of the paper's compute axis: 6 FLOPs a MAC."""
    from pipelines.training import masked
    from pipelines.training.compute import macs_per_image
    from pipelines.training.config import ParallelConfig
    from pipelines.training.memory import activation_bytes, state_bytes
    from vit_model import build_model, count_parameters

    model = _model(recipe)
    head: Literal["linear", "mlp"] = getattr(recipe, "head", "linear")
    task = recipe.train.masked
    built = masked.build(model, task, device="meta") if task else build_model(model, size.classes, head, device="meta")
    parameters = count_parameters(built)
    blocks = [count_parameters(block) for block in getattr(built, "blocks", [])]
    macs = macs_per_image(model, size.classes, head, recipe.train)
    steps, batch = recipe.train.steps(size.images), recipe.train.batch_size
    parallel: ParallelConfig = recipe.parallel
    groups = parallel.replicas or max(1, count // DEVICES_OF_A_NODE)  # hsdp: one a node, as training takes them.
    if parallel.kind == "hsdp" and count % groups:
        raise ValueError(
            f"parallel.replicas={groups} does not divide {count} devices; take --on {hardware.name}x{groups}"
        )
    parts = count // groups if parallel.kind == "hsdp" else count
    state = state_bytes(parameters, max(blocks, default=parameters), recipe.optimizer, recipe.train, parallel, parts)
    image = activation_bytes(model, 0 if task else size.classes, head, recipe.train)
    slower = (RECOMPUTED if recipe.train.activation_checkpointing else 1.0) * (
        FP32_SLOWER if recipe.train.precision == "fp32" else 1.0
    )
    rate = mfu * hardware.peak_flops * count / (6.0 * macs * slower)
    seconds = steps * batch / rate
    dollars = seconds / 3600 * count * (hardware.dollars_per_hour if price is None else price)
    return Estimate(
        parameters=parameters,
        macs_per_image=macs,
        total_steps=steps,
        images_seen=steps * batch,
        state_gib=state / 2**30,
        image_mib=image / 2**20,
        fits=max(0, int((RESERVE * hardware.memory_gib * 2**30 - state) // image)),
        per_device=-(-batch // count),
        step_seconds=batch / rate,
        images_per_second=rate,
        days=seconds / 86_400,
        dollars=dollars,
    )


def describe(
    made: Estimate, recipe: Any, hardware: Hardware, count: int, mfu: float, price: float | None
) -> Iterator[str]:
    cost = hardware.dollars_per_hour if price is None else price
    source = hardware.price_source if price is None else "--price"
    at_once = recipe.train.per_device_batch_size
    yield f"model       {made.parameters:,} parameters, {made.macs_per_image / 1e9:.2f} GMAC an image"
    yield (
        f"budget      {made.total_steps:,} steps of {recipe.train.batch_size:,} images = {made.images_seen:,} images,"
        f" {made.exaflops:,.1f} exaFLOPs"
    )
    yield (
        f"memory      {made.state_gib:.1f} GiB a device for weights, gradients, optimizer ({recipe.parallel.kind}),"
        f" {made.image_mib:.0f} MiB for each image ({recipe.train.precision}) of {hardware.memory_gib:.0f} GiB"
    )
    wanted = made.per_device if at_once in (None, "auto") else min(int(at_once), made.per_device)
    if not made.fits:
        yield "            does not fit: take parallel.kind: fsdp, activation_checkpointing, or more memory"
    elif wanted > made.fits:
        verb = "auto cuts them" if at_once == "auto" else "set train.per_device_batch_size: auto, which cuts them"
        yield f"            {made.fits:,} images fit at once, {wanted:,} fall to each device: {verb}"
    else:
        yield f"            {wanted:,} images at once; {made.fits:,} would fit"
    slower = ["a third more for activation_checkpointing"] if recipe.train.activation_checkpointing else []
    slower += ["twice as long for fp32"] if recipe.train.precision == "fp32" else []
    yield (
        f"time        {made.step_seconds:.3g} s a step, {made.images_per_second:,.0f} images/s on {count} x"
        f" {hardware.name}, if mfu is {mfu:.2f} of {hardware.peak_flops / 1e12:,.0f} TFLOP/s: {_duration(made.days)}"
        f"{' (' + ', '.join(slower) + ')' if slower else ''}"
    )
    yield f"cost        {made.dollars:,.0f} dollars at {cost:.2f} a device and hour ({source})"
    cores = (
        f"about {made.decode_cores:,.0f} cores for 110 kB JPEGs"
        if str(recipe.corpus).partition("@")[0] in OF_SUCH_JPEGS
        else f"cores by the size of its images (110 kB JPEGs would take {made.decode_cores:,.0f})"
    )
    yield f"reading     {made.images_per_second:,.0f} images/s: {cores}"


def _duration(days: float) -> str:
    if days >= 2:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 2 else f"{days * 1440:.1f} minutes"


def _model(recipe: Any) -> ModelConfig:
    from pipelines.fit import model_config

    if recipe.model is not None:
        dropout = {"dropout": recipe.dropout} if getattr(recipe, "dropout", 0.0) else {}
        return model_config(recipe.model, recipe.resolution, **dropout)
    import dataclasses
    import tempfile
    from pathlib import Path

    from pipelines.weights import fetch_weights
    from vit_model import read_specs

    if recipe.weights is None:
        raise ValueError(
            "the size of the model is in its weights: give --weights, or model: {variant: B/16} in a recipe of your"
            " own, to train from scratch"
        )
    with tempfile.TemporaryDirectory(prefix="vit-estimate-") as folder:
        config, _, _ = read_specs(fetch_weights(recipe.weights, Path(folder)).path)
    return dataclasses.replace(config, resolution=recipe.resolution)


def _size(recipe: Any, images: int | None, classes: int | None, prepare: Callable[[], None]) -> Size:
    name = str(recipe.corpus).partition("@")[0]
    if images is not None and classes is not None:
        return Size(images, classes)
    if name in KNOWN:
        return Size(images or KNOWN[name][0], classes or KNOWN[name][1])
    from pipelines.corpus.manifest import open_corpus

    prepare()
    try:
        corpus = open_corpus(recipe.corpus)
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"{error}; without a corpus give --images and --classes") from None
    return Size(images or corpus.splits[recipe.split], classes or len(corpus.class_names))


def main(arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> int:
    """`RECIPE [--on h100x8] [--mfu 0.45] [--price DOLLARS] [--images N] [--classes K] [--dotted.flag VALUE ...]`."""
    from pipelines.why import stage_of

    own: dict[str, str] = {}
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if word in ("--on", "--mfu", "--price", "--images", "--classes"):
            if not words:
                raise RecipeError(f"{word} needs a value; see `vit estimate --help`")
            own[word] = words.pop(0)
        else:
            rest.append(word)
    if not rest or rest[0].startswith("-"):
        raise RecipeError("vit estimate needs a recipe of pretrain or finetune; `vit recipes` lists the packaged ones")
    stage = stage_of(rest[0])
    if stage not in ("pretrain", "finetune"):
        raise RecipeError(f"{rest[0]} is a recipe of {stage}; only pretrain and finetune train")
    recipe = parse(recipe_class(stage), rest, prog=f"vit estimate {stage}")
    hardware, count = find_hardware(own.get("--on", "h100x8"))
    mfu, price = _number(own, "--mfu"), _number(own, "--price")
    images, classes = _number(own, "--images"), _number(own, "--classes")
    size = _size(recipe, int(images) if images else None, int(classes) if classes else None, prepare)
    made = estimate(recipe, size, hardware, count, mfu or MFU, price)
    say(f"{rest[0]}: {size.images:,} images, {size.classes:,} classes")
    for line in describe(made, recipe, hardware, count, mfu or MFU, price):
        say(line)
    return 0


def _number(own: dict[str, str], flag: str) -> float | None:
    if flag not in own:
        return None
    try:
        value = float(own[flag].replace("_", "").replace(",", ""))
    except ValueError:
        value = 0.0
    counted = flag in ("--images", "--classes")
    if not 0 < value < float("inf") or (flag == "--mfu" and value > 1) or (counted and value != int(value)):
        raise RecipeError(
            f"{flag} {own[flag]!r} is no such number; --mfu takes 0 to 1, --images and --classes whole numbers"
        )
    return value
