"""Complete phantom data sets: one call from nothing to the files of a public data set, with the truth beside them.

`estimate_phantom` says what it costs, `make_phantom` makes it, `read_truth` opens what is known about it. One module
a format plans the files; `build` knows the order, `ledger` what is finished, `truth` what is kept for science.
"""

from braindecode_vis.phantom.assemble.build import (
    FORMATS,
    Estimate,
    change_size,
    check_space,
    estimate_phantom,
    make_phantom,
)
from braindecode_vis.phantom.assemble.sizes import SIZE_NAMES, SIZES, PhantomSize
from braindecode_vis.phantom.assemble.truth import PhantomTruth, read_truth

__all__ = [
    "FORMATS",
    "SIZES",
    "SIZE_NAMES",
    "Estimate",
    "PhantomSize",
    "PhantomTruth",
    "change_size",
    "check_space",
    "estimate_phantom",
    "make_phantom",
    "read_truth",
]
