"""One file a recipe: networks and losses, nothing else."""
