"""Starting runs: on a Slurm cluster, or as processes of this machine."""
