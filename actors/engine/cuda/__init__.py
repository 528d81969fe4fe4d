"""What makes a model fast on GPUs: Triton kernels, fused modules, steps as CUDA graphs. Not imported elsewhere."""
