"""What a process holds for as long as it lives, and the garbage collector."""

from __future__ import annotations

import gc


def leave_alone() -> int:
    """Have the garbage collector leave alone what is there by now; how many objects that is.

    With torch and vLLM it is several hundred thousand: to look through them takes a third of a second, in which nothing is
    served, and it would happen again and again. To be called once all is loaded.
    """
    gc.collect()
    gc.freeze()
    return gc.get_freeze_count()
