"""Fast decode steps, put in front of the model's own: one for CPUs, one for CUDA."""
