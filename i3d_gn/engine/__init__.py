"""How anything is trained: loop, optimizer, checkpoints, logs, ranks, configs."""
