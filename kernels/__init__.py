"""Triton kernels, one concept a file; installed as ``florence_fast.kernels``, importing torch and triton only."""
