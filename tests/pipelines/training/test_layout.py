from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.training.layout import Layout, Part, rows_of


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 40), wrote=st.integers(1, 9), reads=st.integers(1, 9))
def test_what_any_number_of_ranks_wrote_any_other_number_reads(rows: int, wrote: int, reads: int) -> None:
    whole = {"model/a": torch.arange(rows * 2).view(rows, 2), "model/b": torch.arange(rows % 3 + 1)}
    layout = Layout(wrote, {name: len(tensor) for name, tensor in whole.items()})
    files = {
        index: {name: tensor[rows_of(Part(index, wrote), len(tensor))] for name, tensor in whole.items()}
        for index in range(wrote)
    }
    files[0]["step"] = torch.tensor(7)
    for index in range(reads):
        part = Part(index, reads)
        found = layout.join({i: files[i] for i in layout.needed(part)}, part)
        assert found["step"] == 7
        for name, tensor in whole.items():
            ours = tensor[rows_of(part, len(tensor))]
            assert torch.equal(found[name], ours) if len(ours) else name not in found or not len(found[name])


def test_a_rank_reads_its_own_file_and_the_first() -> None:
    layout = Layout(8, {"a": 64})
    assert layout.needed(Part(5, 8)) == [0, 5]
    assert layout.needed(Part(1, 2)) == [0, 4, 5, 6, 7]
    assert layout.needed(Part()) == list(range(8))
    assert layout.file_name(3) == "tensors-00003-of-00008.safetensors"


@pytest.mark.parametrize("value", [{}, {"files": 0}, {"files": "2"}, {"files": 2, "rows": [1]}, {"files": 1 << 20}])
def test_a_layout_that_is_none_of_ours_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="none of ours"):
        Layout.from_json(value)


def test_a_layout_survives_json() -> None:
    layout = Layout(3, {"a": 5})
    assert Layout.from_json(layout.to_json()) == layout
    assert Layout().to_json() == {"kind": "replicated", "files": 1}
