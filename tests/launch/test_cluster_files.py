"""The cluster files that are shipped: each is read by the tool that it is for."""

import subprocess

import pytest
from ruamel.yaml import YAML

from dstune.paths import shared_files


@pytest.mark.ray
def test_rays_own_schema_takes_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    document = YAML(typ="safe").load(shared_files("cluster") / "ray-cluster.yaml")
    validate_config(prepare_config(document))
    for commands in (document["head_start_ray_commands"], document["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]


def test_the_batch_template_is_bash():
    text = (shared_files("cluster") / "slurm.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
