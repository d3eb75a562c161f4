"""From the bytes of a page to its samples: where each image lies, its label, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.corpus.members import IMAGE_EXTENSIONS
from pipelines.reader.fetch import PageSpan
from pipelines.reader.labels import find_label, find_labels
from pipelines.reader.tar import TarSample, walk

__all__ = ["Sample", "SampleError", "samples_of_page"]

NOTHING = memoryview(b"")


class SampleError(RuntimeError):
    """A sample is bad and the policy is to stop, or a page holds other samples than the manifest says."""


@dataclass(slots=True)
class Sample:
    """One row to come: where its bytes are, and what is already known to be wrong with it."""

    image: memoryview = NOTHING
    label: int | tuple[int, ...] = 0  # A tuple where the corpus has several labels an image.
    name: str = ""  # Shard and key.
    fault: str = ""


def samples_of_page(
    span: PageSpan, page: memoryview, num_classes: int, corpus: str = "", multi_label: bool = False
) -> list[Sample]:
    """One entry for each sample of the page, whatever its state. `corpus`: the manifest that names the classes."""
    found, problem = walk(page)
    samples = [_sample(sample, page, span.uri, num_classes, corpus, multi_label) for sample in found]
    if len(samples) > span.num_rows or (problem is None and len(samples) < span.num_rows):
        raise SampleError(
            f"{span.uri}: the page at byte {span.offset:,} holds {len(samples)} samples, the manifest says "
            f"{span.num_rows}; the shard is not the manifest's: restore it or index it again"
        )
    if problem is not None:
        fault = f"{problem.reason}: {span.uri}, page at byte {span.offset:,}: {problem}"
        samples += [Sample(fault=fault) for _ in range(span.num_rows - len(samples))]
    return samples


def _sample(found: TarSample, page: memoryview, uri: str, num_classes: int, corpus: str, multi_label: bool) -> Sample:
    sample = Sample(name=f"{uri}, sample {found.key}")
    for extension in IMAGE_EXTENSIONS:
        image = found.members.get(extension)
        if image is not None:
            sample.image = page[image[0] : image[0] + image[1]]
            break
    else:
        sample.fault = f"missing_image: {sample.name} has members {sorted(found.members)}"
        return sample
    sample.label, problem = (find_labels if multi_label else find_label)(found, page, num_classes, corpus)
    if problem:
        reason, _, text = problem.partition(": ")
        sample.fault = f"{reason}: {sample.name}: {text}"
    return sample
