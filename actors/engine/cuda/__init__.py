"""What makes a model fast on GPUs: Triton kernels, fused modules, whole steps as CUDA graphs. Imported only where used."""
