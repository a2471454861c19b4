"""The clusters of the launch tests serve here too."""

from tests.launch.conftest import ray_head, slurm

__all__ = ["ray_head", "slurm"]
