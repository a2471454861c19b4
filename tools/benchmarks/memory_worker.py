"""One worker of `tools/bench memory`: a real attempt, a few steps long, whose records name its peak."""

import sys

from dstune import worker

if __name__ == "__main__":
    worker.main(sys.argv[1], 1)
