"""Questions asked of a run: analyses of what is decoded when and where, the leak audit, and sweeps over settings."""
