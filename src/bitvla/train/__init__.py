"""Training: `run(stage, config, data, out)`. One loop, one objective a stage, batches that are a function of the step."""
