"""Training: one loop, one objective a stage, batches that are a pure function of the step. Start at `loop.run`."""
