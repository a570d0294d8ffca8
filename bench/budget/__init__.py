"""The static budget: kernels compiled for A100 and H100/H200 without a GPU, and held to what memory allows."""
