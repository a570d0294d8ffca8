"""The static budget's cases, one file for each op; a new op is one more file here."""
