"""What checkpoints are and can do, on arrays and tensors: features, baselines, probes, functional evaluation, plots, reports."""
