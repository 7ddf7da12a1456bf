"""What a step will take on a cluster that is not here: seconds, memory, and the best settings.

Everything but `work` (which looks at the real model) and `calibrate` (which measures this machine)
is arithmetic on plain numbers.
"""
