"""Making a corpus of sources, and growing it.

Owns the shards and the manifest: what was added, who is who, and who is held out. A kill loses the shard that was being
written and nothing else; what was added before is never read again.
"""
