"""What ``python -m bench.cpu`` measures on this machine's processor, one subject a file."""
