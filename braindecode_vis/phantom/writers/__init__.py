"""Writers of the public data sets' own file formats, one module a format, traps included.

A writer takes plain arrays, tables and iterators and knows nothing of the simulators that made them. Streams
are written as they arrive: peak memory does not grow with the length of a recording. A file appears under its
final name only when it is complete, and the same input gives the same bytes.
"""
