"""What ``python -m bench.cpu.native`` measures of the native CPU backend, one subject a file."""
