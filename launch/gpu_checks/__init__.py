"""`dist-vse doctor --gpu`: checks of this machine's GPUs, and of what the product does there."""
