"""The C code against hostile files, under address and undefined-behaviour sanitizers.

    make fuzz                                     FUZZ_SECONDS=60
    python -m tests.fuzz.run --seconds 60 [--corpus DIR] [--planted [rows|pair]]

clang's libFuzzer where it is installed (Debian: clang libclang-rt-14-dev llvm), else gcc and blind mutations. --planted
puts an overflow into a copy of the sources, which the same command must find. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

ROOT = Path(__file__).parents[2]
NATIVE = "pipelines/reader/native"
FOLDERS = (NATIVE, "pipelines/corpus/native")
SANITIZE = ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
PLANTED = {  # (file, what stands there, what is written in its place)
    # Rows of luma in 4:2:0 are forgotten: its blocks are written past the end.
    "rows": [
        (
            f"{NATIVE}/decode.c",
            "rows = (a->end_row - a->row) * p->v * p->block;",
            "rows = (a->end_row - a->row) * p->block;",
        )
    ],
    # The place for runs off a block's end is there for the first block of a pair only.
    "pair": [
        (f"{NATIVE}/native.h", "#define PAIR_SIZE (BLOCK_PAIR + 16)", "#define PAIR_SIZE (BLOCK_PAIR + 8)"),
        (f"{NATIVE}/entropy.c", "_Static_assert(BLOCK_PAIR + 8 < PAIR_SIZE,", "_Static_assert(BLOCK_PAIR < PAIR_SIZE,"),
    ],
}


def seeds() -> Iterator[bytes]:
    """Small JPEGs of every kind, some damaged; ten bytes before each choose crop and output."""
    ImageFile.MAXBLOCK = 1 << 20
    rng = np.random.default_rng(0)
    kinds: list[dict[str, object]] = [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": 2, "restart_marker_blocks": 2},
        {"subsampling": 0, "restart_marker_rows": 1, "optimize": True},
        {"progressive": True},
        {"exif": b"Exif\0\0II*\0\10\0\0\0\1\0\22\1\3\0\1\0\0\0\1\0\0\0\0\0\0\0"},
        {"icc_profile": b"profile", "comment": b"comment"},
        {"qtables": [[200] * 64, [1] * 64], "subsampling": 2},
    ]
    for kind in kinds:
        for mode in ("RGB", "L", "CMYK"):
            for width, height in ((1, 1), (17, 9), (40, 35), (70, 64)):
                y, x = np.mgrid[0:height, 0:width]
                waves = np.stack([127 + 90 * np.sin(x / k) * np.cos(y / 9) for k in (5, 9, 14)], -1)
                noise = rng.normal(0, rng.choice([0, 5, 60]), waves.shape)
                image = Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8)).convert(mode)
                options = dict(kind)
                if mode != "RGB":
                    options.pop("subsampling", None)
                    if "qtables" in options:
                        options["qtables"] = [[200] * 64]
                file = io.BytesIO()
                image.save(file, "JPEG", **({"quality": int(rng.choice([20, 75, 98]))} | options))
                data = file.getvalue()
                yield rng.bytes(10) + data
                if width == 40:
                    yield rng.bytes(10) + data[: len(data) * 2 // 3]
                    yield rng.bytes(10) + data.replace(b"\x22\x00", b"\x41\x00")  # 4:1:1


def sources(planted: str | None, folder: Path) -> list[Path]:
    """All C files but the doors to Python, from a copy."""
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, folder / name, ignore=lambda _, names: [n for n in names if n[-2:] not in (".c", ".h")]
        )
    for name, right, wrong in PLANTED[planted] if planted else ():
        text = (folder / name).read_text()
        assert right in text, f"{name} has changed: plant the overflow elsewhere"
        (folder / name).write_text(text.replace(right, wrong))
    return [path for name in FOLDERS for path in sorted((folder / name).glob("*.c")) if path.name != "module.c"]


def build(files: list[Path], folder: Path, flags: list[str], own: list[str], compiler: str, name: str) -> Path | None:
    binary = folder / name
    includes = [f"-I{folder / part}" for part in FOLDERS]
    here = [str(Path(__file__).parent / part) for part in own]
    command = [compiler, "-std=c11", *flags, *includes, *here, *map(str, files), "-ljpeg", "-lm", "-o", str(binary)]
    made = subprocess.run(command, capture_output=True, text=True)
    return binary if made.returncode == 0 else None


def fuzz(binary: Path, is_libfuzzer: bool, seconds: int, corpus: Path, seed_folder: Path) -> tuple[int, str]:
    if is_libfuzzer:
        options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=20", "-rss_limit_mb=2500"]
        options += ["-max_len=20000", f"-artifact_prefix={corpus.parent}/", "-verbosity=1"]
        command = [str(binary), *options, str(corpus), str(seed_folder)]
    else:
        command = [str(binary), str(seconds), *map(str, sorted(seed_folder.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=corpus.parent)
    return done.returncode, done.stdout + done.stderr


def coverage(files: list[Path], folder: Path, corpus: Path, seed_folder: Path) -> dict[str, float]:
    """Line coverage in percent of each of our C files, by clang's own instrumentation; empty without its tools."""
    profdata, cov = (shutil.which(f"llvm-{tool}") or shutil.which(f"llvm-{tool}-14") for tool in ("profdata", "cov"))
    flags = ["-g", "-O1", "-fsanitize=fuzzer", "-fprofile-instr-generate", "-fcoverage-mapping"]
    binary = build(files, folder, flags, ["target.c"], "clang", "covered") if profdata and cov else None
    if binary is None or profdata is None or cov is None:
        return {}
    environment = {**os.environ, "LLVM_PROFILE_FILE": str(folder / "raw")}
    command = [str(binary), "-runs=0", str(corpus), str(seed_folder)]
    subprocess.run(command, capture_output=True, env=environment, check=True)
    subprocess.run([profdata, "merge", str(folder / "raw"), "-o", str(folder / "merged")], check=True)
    report = [cov, "export", "-summary-only", f"-instr-profile={folder / 'merged'}", str(binary)]
    data = json.loads(subprocess.run(report, capture_output=True, text=True, check=True).stdout)["data"][0]
    return {
        Path(file["filename"]).relative_to(folder / "pipelines").as_posix(): round(
            file["summary"]["lines"]["percent"], 1
        )
        for file in data["files"]
        if Path(file["filename"]).is_relative_to(folder) and file["filename"].endswith(".c")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="keep what was found here, and go on from it")
    parser.add_argument(
        "--planted", nargs="?", const="rows", choices=PLANTED, help="an overflow in a copy of the sources must be found"
    )
    parser.add_argument("--no-coverage", action="store_true", help="do not build a second time to count lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vit-fuzz-") as name:
        folder = Path(name)
        corpus, seed_folder = arguments.corpus or folder / "corpus", folder / "seeds"
        corpus.mkdir(parents=True, exist_ok=True)
        seed_folder.mkdir()
        for i, seed in enumerate(seeds()):
            (seed_folder / f"{i:03}").write_bytes(seed)
        files = sources(arguments.planted, folder)
        flags = [*SANITIZE, "-fsanitize=fuzzer,address,undefined"]
        binary = build(files, folder, flags, ["target.c"], "clang", "fuzz") if shutil.which("clang") else None
        is_libfuzzer = binary is not None
        if binary is None:
            print("clang with libFuzzer is not here: gcc and blind mutations")
            flags = [*SANITIZE, "-fsanitize=address,undefined"]
            binary = build(files, folder, flags, ["target.c", "mutate.c"], "gcc", "fuzz")
        if binary is None:
            print("no compiler with sanitizers and libjpeg-turbo's headers is here", file=sys.stderr)
            return 2
        code, log = fuzz(binary, is_libfuzzer, arguments.seconds, corpus.resolve(), seed_folder)
        executions = re.search(r"number_of_executed_units: (\d+)", log)
        result: dict[str, object] = {
            "fuzzer": "libfuzzer" if is_libfuzzer else "mutations",
            "seconds": arguments.seconds,
        }
        result |= {"executions": int(executions[1]) if executions else 0, "corpus": len(list(corpus.iterdir()))}
        if code:
            print(log[-6000:])
            summary = re.findall(r"SUMMARY: .*|ERROR: AddressSanitizer: \S+", log)
            result["found"] = summary[-1] if summary else f"exit {code}"
        elif is_libfuzzer and not (arguments.planted or arguments.no_coverage):
            result["line_coverage"] = coverage(files, folder, corpus, seed_folder)
        print(json.dumps(result))
    return int((code == 0) if arguments.planted else (code != 0))


if __name__ == "__main__":
    sys.exit(main())
