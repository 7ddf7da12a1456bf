"""Settings that must stand before torch or DeepSpeed is imported."""

import multiprocessing
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Ranks are forked from one server that has paid for the imports already.
multiprocessing.set_forkserver_preload(
    ["torch._inductor.compile_fx", "deepspeed", "deepspeed.runtime.zero.stage3"]
)
