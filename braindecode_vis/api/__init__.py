"""The public Python interface: data from arrays, a decoder object, and runs with their results.

Everything here is re-exported lazily by `braindecode_vis` itself, so that ``import braindecode_vis as bdv`` loads
nothing heavy. These names are stable; the packages below may change.
"""
