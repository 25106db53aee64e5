"""Decoding of a stream while it runs: sources of samples, decoders, and listeners.

`stream_roles` holds the contract between the parts; nothing here has an own copy of a step of the pipeline.
"""
