"""The routed experts of the MoE layers, spread over the expert-parallel group."""
