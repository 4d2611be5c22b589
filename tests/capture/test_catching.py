"""Whether an error raised here would be caught: by `except` and `suppress`, and by nothing else."""

import contextlib

import pytest

from unbatch.capture.catching import errors_are_caught


def cleanup():
    """Stand for what is done in any case."""


def caught():
    return errors_are_caught(lambda frame: frame.f_code.co_filename == __file__, {test.__code__})


def by_except():
    try:
        return caught()
    except ValueError:
        return None


def by_any_except():
    try:
        return caught()
    except:  # noqa: E722
        return None


def further_up():
    try:
        with contextlib.nullcontext():
            try:
                return caught()
            finally:
                cleanup()
    except (ValueError, TypeError) as error:
        return error


def in_a_loop():
    for _ in range(2):
        try:
            seen = caught()
            break
        except ValueError:
            continue
    return seen


def suppressed():
    with contextlib.suppress(ValueError):
        return caught()


def called_from_try():
    return by_except()


def by_finally():
    try:
        return caught()
    finally:
        cleanup()


def by_with():
    with contextlib.nullcontext():
        return caught()


def after_try():
    try:
        cleanup()
    except ValueError:
        return None
    return caught()


def in_a_handler():
    try:
        raise ValueError
    except ValueError:
        return caught()


CAUGHT = (by_except, by_any_except, further_up, in_a_loop, suppressed, called_from_try)
HANDED_ON = (by_finally, by_with, after_try, in_a_handler, caught)


@pytest.mark.parametrize("function", [*CAUGHT, *HANDED_ON])
def test(function):
    assert function() == (function in CAUGHT)
