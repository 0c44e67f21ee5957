"""The interpreter's search for garbage, kept short while training goes on."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_old_objects() -> Iterator[None]:
    """Leave out of every search for garbage what is there already: torch's own objects and the model.

    A save makes so many small objects that it starts a search or two. One through everything takes 0.14 s, in which
    the rank does not train and the others wait for it.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # what only cycles hold must go when the process group ends
