"""The backends: one file each, one row here."""
