"""Parts of the simulator: its clock, its record and its checkpoints."""
