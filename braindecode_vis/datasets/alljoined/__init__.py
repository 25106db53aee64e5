"""Alljoined1 and Alljoined-1.6M (EEG)."""
