"""Windows on a memory: held against PyTorch, which writes through one view and reads through
another.
"""

import itertools

import pytest
import torch
from torch import nn

from unbatch.capture.aliasing import (
    Window,
    by_memory,
    overwritten,
    places,
    seen_through_older_windows,
)
from unbatch.capture.program import Program, record

MEMORY = torch.arange(24.0)
VIEWS = {
    "whole": lambda m: m.view(4, 6),
    "transposed": lambda m: m.view(4, 6).T,
    "row": lambda m: m.view(4, 6)[1],
    "column": lambda m: m.view(4, 6)[:, 2],
    "every other": lambda m: m[1::2],
    "one entry": lambda m: m[5],
    "nothing": lambda m: m[3:3],
}
PAIRS = list(itertools.product(VIEWS, VIEWS))


@pytest.mark.parametrize("name", VIEWS)
def test_a_window_shows_what_the_view_does(name):
    view = VIEWS[name](MEMORY)
    window = Window.of_tensor(view)
    assert torch.equal(window(MEMORY), view)
    assert torch.equal(MEMORY[torch.from_numpy(window.positions)], view)
    assert window.end <= len(MEMORY)


@pytest.mark.parametrize(("written", "seen"), PAIRS)
def test_what_is_written_through_one_is_seen_through_the_other(written, seen):
    memory = MEMORY.clone()
    target, shown = VIEWS[written](memory), VIEWS[seen](memory)
    through, window = Window.of_tensor(target), Window.of_tensor(shown)
    was, new = shown.clone(), -1 - torch.arange(target.numel()).view(target.shape).float()
    target.copy_(new)
    assert torch.equal(overwritten(was, window, new, through), shown)
    (place,) = places(through, [window])
    expected = torch.where(shown < 0, -1 - shown, -1)  # what was written there counts the entries
    assert torch.equal(torch.from_numpy(place), expected.long())


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "nothing"])
def test_a_part_of_a_whole(name):
    whole = Window.of_tensor(MEMORY.view(4, 6))
    window = Window.of_tensor(VIEWS[name](MEMORY))
    assert window.is_part_of(whole)
    assert window._replace(offset=window.offset + 24).is_part_of(whole) is False
    assert whole.is_part_of(Window.of_tensor(MEMORY.view(4, 6).T)) is False, (
        "a whole with another order"
    )


class Written(nn.Module):
    """Writes to a slice of a hidden value, and reads that value (``later``), or only the slice,
    afterwards.
    """

    def __init__(self, later: bool):
        super().__init__()
        self.linear, self.later = nn.Linear(3, 3), later

    def forward(self, x):
        h = self.linear(x)
        first = h[:, 0]
        first.mul_(2)
        return h if self.later else first * 1


@pytest.mark.parametrize("later", [True, False])
def test_a_memory_read_through_an_older_window_is_noticed(later):
    model = Written(later)
    graph, _ = record(
        Program(model, torch.sum, dict(model.named_parameters())), (torch.ones(2, 3),), None
    )
    hidden = next(s for s in graph.steps if s.name == "addmm").outs[0]
    storage = graph.values[hidden.index].storage
    shared = seen_through_older_windows(graph, [r.index for r in graph.predictions])
    assert (storage in shared) == later
    assert hidden.index in by_memory(graph)[storage]
    assert len(by_memory(graph)[storage]) > 2


def test_a_window_that_forgets_its_offset_is_caught(monkeypatch):
    """A planted bug."""
    row, whole = Window.of_tensor(VIEWS["row"](MEMORY)), Window.of_tensor(VIEWS["whole"](MEMORY))
    (right,) = places(row, [whole])
    (wrong,) = places(row._replace(offset=0), [whole])
    assert (right[1] >= 0).all()
    assert (wrong[1] < 0).all()
