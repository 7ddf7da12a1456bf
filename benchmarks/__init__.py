"""What compares dist_vse with its peers, and measures it: not part of the wheel."""
