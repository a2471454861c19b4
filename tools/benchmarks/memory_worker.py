"""One worker of `tools/bench memory`: a real attempt, a few steps long, whose records name its peak."""

import sys

from dstune.engine import heap

if __name__ == "__main__":
    heap.start_again()
    from dstune import worker

    worker.main(sys.argv[1], 1)
