"""Triton's interpreter without what it repeats, which took half of an interpreted run.

Before every call of a kernel, and of a function within one, it replaces what triton.language has for a GPU, and afterwards puts
it back. Here it stays replaced.
"""

import functools

from triton.runtime import interpreter

_replace = interpreter._patch_lang


@functools.cache
def _replace_once(kernel):
    scope = _replace(kernel)
    scope._changes.clear()  # nothing to put back
    return scope


interpreter._patch_lang = _replace_once
