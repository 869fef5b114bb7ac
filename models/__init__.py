"""The BLIP networks, their losses and generation, and the reading of checkpoints."""
