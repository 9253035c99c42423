"""Run one model on several processes: the job, sharding, tensor and pipeline parallelism."""
