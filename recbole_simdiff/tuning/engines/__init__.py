"""Search engines, all optional: one file each, behind ``trials.Engine``."""
