"""Settings that must stand before torch or DeepSpeed is imported."""

import multiprocessing
import os
import signal

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A background shell starts its commands deaf to Ctrl-C; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ranks are forked from one server that has paid for the imports already.
multiprocessing.set_forkserver_preload(
    ["torch._inductor.compile_fx", "deepspeed", "deepspeed.runtime.zero.stage3", "timm"]
)
