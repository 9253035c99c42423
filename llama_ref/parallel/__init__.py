"""One model on several processes: the job, who holds what, tensor and pipeline parallelism."""
