"""A stream decoded while it runs: where samples come from, what is decided of them, and who is told.

`stream_roles` holds the contract between the parts; nothing here has an own copy of a step of the pipeline.
"""
