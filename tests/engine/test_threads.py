"""Who computes on how many processors, in a process of its own: the numbers hold for all that comes later in it."""

import subprocess
import sys

SCRIPT = """
import threading
import torch
from dstune.engine.threads import compute_here

def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

def train():
    compute_here(2)
    torch.randn(512, 512).exp()
    in_a_thread(lambda: print("later", torch.get_num_threads()))
    print("training", torch.get_num_threads())

compute_here(1)
in_a_thread(train)
print("planning", torch.get_num_threads())
"""


def test_the_thread_that_trains_is_the_only_one_with_several_processors():
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["later 1", "training 2", "planning 1"]
