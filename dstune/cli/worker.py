"""One worker of a run. Ray, torchrun or srun start it on each rank; under the latter two, worker 0 also plans the attempt."""

import argparse
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run file or run directory, the same on every rank")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    from dstune.engine import heap
    from dstune.launch import start

    if not start.local_gpus() and "worker" in sys.orig_argv:  # or somebody else's program would begin again
        heap.start_again()
    from dstune import api
    from dstune.engine import world

    status = api.work(args.run, args.overrides)
    if world.joined():  # after a failure: the libraries' own way out waits for workers that wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
