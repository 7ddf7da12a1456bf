"""Our loss and gradient caching in training loops of other libraries, each against one process.

python -m examples               # all: one process, then two; how far their weights differ
python -m examples with_ddp
torchrun --nproc-per-node 2 -m examples.with_ddp      # an example by itself
"""
