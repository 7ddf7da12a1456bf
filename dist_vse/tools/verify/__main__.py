"""`accelerate launch -m dist_vse.tools.verify CONFIG`: the same command under a launcher."""

import sys

from dist_vse.tools.verify.cli import main

if __name__ == "__main__":
    sys.exit(main())
