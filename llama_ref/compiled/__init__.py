"""Fast decode steps that replace the model's own: one for CPUs, one for CUDA."""
