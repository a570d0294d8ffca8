"""Charts, tables and goals from the stored results."""
