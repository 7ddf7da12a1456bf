"""`accelerate launch -m dist_vse.verify CONFIG`: the same command under a launcher."""

import sys

from dist_vse.verify.cli import main

if __name__ == "__main__":
    sys.exit(main())
