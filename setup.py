"""The C extensions; everything else stands in pyproject.toml.

Both are optional: without a compiler (or, for the second, libjpeg-turbo's headers) the install succeeds without a word,
and the reader decodes with wheels alone. tests/pipelines/reader/test_native.py says whether they should be there.
"""

from pathlib import Path

from setuptools import Extension, setup

FLAGS = ["-std=c11", "-O3", "-fvisibility=hidden"]
READER, CORPUS = "pipelines/reader/native", "pipelines/corpus/native"


def files(folder: str, suffix: str) -> list[str]:
    return sorted(path.as_posix() for path in Path(folder).glob(f"*{suffix}"))


setup(
    ext_modules=[
        Extension(
            "pipelines.reader.native._jpeg",
            files(READER, ".c"),
            depends=files(READER, ".h"),
            extra_compile_args=FLAGS,
            libraries=["m"],
            optional=True,
        ),
        Extension(
            "pipelines.corpus.native._tiled",
            files(CORPUS, ".c"),
            depends=files(CORPUS, ".h"),
            extra_compile_args=FLAGS,
            libraries=["jpeg"],
            optional=True,
        ),
    ]
)
