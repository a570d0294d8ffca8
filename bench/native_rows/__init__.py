"""What ``python -m bench.cpu_native`` measures of the native CPU backend, one subject a file."""
