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


def settle() -> None:
    """Exempt everything that exists now from later collections. For the moment when libraries or data have been loaded that
    stay until the process ends, and before a model is: they are a million objects, and looking through them each time that
    a model is let go takes half a second, longer than a tiny one is trained."""
    gc.collect()
    gc.freeze()


def used_up(rows: list) -> Iterator:
    """The rows of a list that nobody else needs, each of them let go once the next is asked for; the list ends empty."""
    rows.reverse()
    while rows:
        yield rows.pop()
