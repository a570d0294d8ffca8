"""What can be measured on a processor."""
