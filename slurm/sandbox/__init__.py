"""A real Slurm cluster on one machine: nodes that can be killed, brought back and unplugged."""
