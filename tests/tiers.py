"""The order in which tests run, and which of them are the quick tier.

Tests of one case and mode run one after the other, so that its recording is made once.
"""

import pytest


def recording_of(item: pytest.Item) -> tuple[str, str] | None:
    """Return the case and mode of the problem that a test is lent; None of a test that is lent none."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or "recorded" not in item.fixturenames:
        return None
    return callspec.params["case"].name, callspec.params.get("mode", "train")


def by_recording(items: list[pytest.Item]) -> list[pytest.Item]:
    """The same tests, where the first that is lent a recording is followed by all of the same recording, and so on."""
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    others, first = [], None
    for item in items:
        key = recording_of(item)
        if key is None:
            others.append(item)
            continue
        if first is None:
            first = len(others)
        groups.setdefault(key, []).append(item)
    lent = [item for group in groups.values() for item in group]
    return others[:first] + lent + others[first:] if lent else others
