"""`dist-vse verify --peer`: the losses of other libraries on several ranks, against one process.

Each runs as its users run it, on the same towers and pairs, under PyTorch's DDP and under
DeepSpeed. The reference is that library's own formula, in float64, in one process with the whole
batch.
"""
