"""Which threads of a worker compute: the one that trains, with as many as the run gives it, and no other with more than itself."""

import threading

import torch


def compute_here(threads: int) -> None:
    """The calling thread computes on `threads` processors, and threads that begin to compute later on one each.

    NOTE: OpenMP keeps a team for each thread that calls it, and as soon as there are more of them than processors it has all of them
    sleep between two calls: 0.1 ms to wake one, thousands of times in a step. Gloo's threads and the driver's would make teams.
    """
    torch.get_num_threads()  # or this thread's first operation would still take the number that the next line but one sets
    torch.set_num_threads(threads)
    others = threading.Thread(target=torch.set_num_threads, args=(1,), name="one processor")
    others.start()
    others.join()
