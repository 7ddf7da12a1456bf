"""The train step, and what is needed to take one."""
