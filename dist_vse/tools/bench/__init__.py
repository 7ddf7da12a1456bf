"""`dist-vse bench scale`: speed, memory and traffic of a training step."""
