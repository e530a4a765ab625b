"""Many objects at once."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """For making many objects that stay: the collector of cyclic garbage would look through all of them again and again,
    and find none. Doubles the speed of reading a million rows."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def used_up(rows: list) -> Iterator:
    """The rows of a list that nobody else needs, each of them let go once the next is asked for; the list ends empty."""
    rows.reverse()
    while rows:
        yield rows.pop()
