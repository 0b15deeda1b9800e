"""Mutants of what a GPU does, killed by tests that run its arithmetic on the CPU."""

from __future__ import annotations

OF_GPU = [
    (
        "slices of other arrays taken for a stack",
        "xp/blocks.py",
        "x.untyped_storage().data_ptr() != memory",
        "False",
        "test_torch_assembled.py",
    ),
    (
        "slices at no distance taken for a stack",
        "xp/blocks.py",
        "x.storage_offset() != start + i * step",
        "x.storage_offset() != start + min(i, 1) * step",
        "test_torch_assembled.py",
    ),
    (
        "what is not zero taken for zeros behind a matrix",
        "xp/gpu.py",
        "vars(base).get(_INSIDE) != tuple(x.shape[1:])",
        "vars(base).get(_INSIDE) is None",
        "test_precision.py",
    ),
    (
        "the gram of all images but the first",
        "xp/gpu.py",
        "xp.sum(xp.matmul(x.mT, x), axis=(0, 2))",
        "xp.sum(xp.matmul(x.mT, x)[:, :, 1:], axis=(0, 2))",
        "test_precision.py",
    ),
    ("the loosest precision of a call", "xp/precision.py", "rows = min(", "rows = max(", "test_precision.py"),
    ("TF32 left on", "xp/precision.py", "            switch(old)", "            pass", "test_precision.py"),
    ("twos for ones", "xp/windows.py", "rows[..., found] = 1", "rows[..., found] = 2", "test_precision.py"),
    (
        "one piece of the batch",
        "convolution/pieces.py",
        "found = part if found is None else found + part",
        "found = part",
        "test_precision.py",
    ),
    (
        "a failed half",
        "xp/halves.py",
        "return found, root, good & fine",
        "return found, root, good",
        "test_precision.py",
    ),
    (
        "directions of a device left unchecked",
        "solution.py",
        "codes = kept(together([solutions[i].code for i in ours]), together(fine), int(Code.NONFINITE))",
        "codes = together([solutions[i].code for i in ours])",
        "test_checked_together.py",
    ),
]
