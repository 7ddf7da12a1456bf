"""`accelerate launch -m dist_vse.tools.verify CONFIG`: the same command under a launcher."""

import sys

from dist_vse.common.extras import run_module

if __name__ == "__main__":
    sys.exit(run_module("dist_vse.tools.verify", home="dist_vse.tools.verify.cli"))
