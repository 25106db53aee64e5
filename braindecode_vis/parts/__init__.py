"""What a run can do without, each in one folder that may be deleted; the core imports none of them."""
