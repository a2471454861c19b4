"""Run files: every problem at once, each with its line, its nearest key, and what to do."""

from pathlib import Path

import pytest

from dstune.config import identity
from dstune.config.load import dump, load_run, load_site, read_yaml, resolve
from dstune.config.schema import CheckpointSection
from dstune.config.units import duration_seconds
from dstune.errors import ConfigError, UsageError

GOOD = """\
name: tiny
model: {path: builtin:tiny-llama}
data:
  sources:
    - {path: data.jsonl}
train: {lr: 1e-5}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_1_2_numbers_and_words(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, GOOD + "validate: {every: 7}\n"))
    assert run.config.train.lr == 1e-5
    assert run.config.validate_.every == 7
    assert run.base == tmp_path
    # YAML 1.1 would read this name as the boolean false.
    assert load_run(write(tmp_path, GOOD.replace("tiny\n", "no\n"))).config.name == "no"


def test_every_problem_of_the_file_comes_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
name: x
model: {path: a, dtypo: bf16}
data:
  sources:
    - {path: b, fromat: alpaca}
  max_lenght: 4
train:
  global_batch_size: lots
cluster: {workers: many}
checkpoint: {every: 3 fortnights}
"""
    with pytest.raises(ConfigError) as caught:
        load_run(write(tmp_path, text))
    message = str(caught.value)
    for line, words in [
        (2, "did you mean 'dtype'?"),
        (5, "did you mean 'format'?"),
        (6, "did you mean 'max_length'?"),
        (8, "train.global_batch_size is 'lots'"),
        (9, "cluster.workers is 'many'"),
        (10, "'3 fortnights' is no duration"),
    ]:
        assert f"run.yaml:{line}" in message
        assert words in message
    assert len(caught.value.problems) == 6


def test_overrides_go_over_the_file_and_are_named_in_errors(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    run = load_run(path, ["train.epochs=2.5", "cluster.workers=[1, 4]", "data.sources.0.repeat=0.5", "train.lr=3e-4"])
    assert run.config.train.epochs == 2.5
    assert run.config.cluster.workers == (1, 4)
    assert run.config.data.sources[0].repeat == 0.5
    assert run.config.train.lr == 3e-4
    assert load_run(path, ["data.validation=[]"]).config.data.validation == 0, "no sources are none, and no empty set"
    with pytest.raises(ConfigError, match=r"override 'train\.seed=abc'"):
        load_run(path, ["train.seed=abc"])
    for near in ("lrr", "learning_rate", "lerning_rate"):
        with pytest.raises(ConfigError, match="did you mean 'lr'"):
            load_run(path, [f"train.{near}=1"])
    for key, whole in (
        ("workers", "data.workers' or 'cluster.workers"),
        ("epoch", "train.epochs"),
        ("learning_rate", "train.lr"),
    ):
        with pytest.raises(ConfigError, match=f"unknown key '{key}'\n.*did you mean '{whole}'"):
            load_run(path, [f"{key}=1"])
    for nonsense in ("train.lr", "=3", "data.sources.7.path=x", "name.first=x"):
        with pytest.raises(UsageError, match="override"):
            load_run(path, [nonsense])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("", "holds nothing"),
        ("name: x\nname: y\n", "run.yaml:2: not YAML: found duplicate key"),
        ("a: !!python/object/apply:os.system ['true']\n", "is missing"),
        ("name: x\n", "'model' is missing"),
        (GOOD + "train: {lr: 1}\n", "duplicate key"),
        (GOOD.replace("tiny\n", "../../etc\n"), "name is '../../etc'"),
        (GOOD.replace("{lr: 1e-5}", "{epochs: 1, max_steps: 2}"), "either `epochs` or `max_steps`"),
        (GOOD.replace("    - {path: data.jsonl}", "    []"), "either `sources` or `prepared`"),
        (GOOD + "checkpoint: {dir: /data, staging: /tmp}\n", "`staging` goes with an address"),
    ],
)
def test_broken_files_are_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write(tmp_path, text))
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="is a directory"):
        load_run(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_run(tmp_path / "bytes.yaml")


def test_an_alias_bomb_costs_nothing(tmp_path: Path) -> None:
    levels = "\n".join(f"l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 9)}]" for n in range(8))
    path = write(tmp_path, f"l0: &l0 [x, x]\n{levels}\n")
    with pytest.raises(ConfigError, match="aliases multiply"):
        load_run(path)


def test_what_is_dumped_loads_as_the_same(tmp_path: Path) -> None:
    config = load_run(write(tmp_path, GOOD)).config
    again = tmp_path / "again.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load_run(again).config == config


def test_sites_are_looked_up_beside_the_run_file_and_in_the_users_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config/dstune").mkdir(parents=True)
    (tmp_path / "config/dstune/hpc.yaml").write_text("slurm: {partition: gpu, time: '12:00:00'}\n")
    assert load_site("hpc", tmp_path).slurm.partition == "gpu"
    (tmp_path / "hpc.yaml").write_text("slurm: {partition: near}\n")
    assert load_site("hpc", tmp_path).slurm.partition == "near"
    with pytest.raises(UsageError, match="no such site file"):
        load_site("moon", tmp_path)


def test_relative_paths_are_relative_to_the_file() -> None:
    assert resolve("a/b", Path("/x")) == Path("/x/a/b")
    assert resolve("/a/b", Path("/x")) == Path("/a/b")


def test_durations() -> None:
    assert duration_seconds("30min") == 1800
    assert duration_seconds("1.5h") == 5400
    for wrong in ("", "min", "3 weeks", "-1h", "0s", "1e3s"):
        with pytest.raises(ValueError):
            duration_seconds(wrong)


def test_plain_reading_keeps_lines(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, GOOD))["name"] == "tiny"


def test_a_setting_in_one_of_several_forms_is_told_for_the_form_that_was_meant(tmp_path: Path) -> None:
    text = GOOD.replace("data:\n", "data:\n  deduplicate: {threshold: 2}\n")
    with pytest.raises(ConfigError, match=r"run.yaml:\d+: data.deduplicate.threshold is 2") as caught:
        load_run(write(tmp_path, text))
    assert len(caught.value.problems) == 1


def test_what_stays_for_ever_is_counted_in_steps_that_are_saved(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_run(path, ["checkpoint.every=200", "checkpoint.keep_every=1000"]).config.checkpoint.keep_every == 1000
    with pytest.raises(ConfigError, match="give `every` in steps too"):
        load_run(path, ["checkpoint.every=30min", "checkpoint.keep_every=1000"])


def test_checkpoints_go_to_a_directory_or_to_an_address() -> None:
    for written, directory, address in (
        ({}, None, None),
        ({"dir": "/data"}, "/data", None),
        ({"dir": "file:///data"}, "/data", None),
        ({"dir": "s3://bucket/x"}, None, "s3://bucket/x"),
        ({"dir": "s3://bucket/x", "staging": "/nvme"}, "/nvme", "s3://bucket/x"),
    ):
        section = CheckpointSection(**written)
        assert (section.directory, section.address) == (directory, address)


@pytest.mark.parametrize(
    "written",
    [
        "dir: ''",
        "dir: s3:/bucket",
        "dir: file://host/x",
        "dir: $HOME/x",
        "dir: ' s3://b/x'",
        r'dir: "a\0b"',
        "{dir: 's3://b/x', staging: 's3://b/y'}",
        "best: accuracy",
        "best: ''",
    ],
)
def test_where_checkpoints_go_and_what_is_best_cannot_be_mistaken(tmp_path: Path, written: str) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"name: t\nmodel: {{path: x}}\ndata: {{sources: [{{path: x}}]}}\ncheckpoint:\n  {written}\n")
    with pytest.raises(ConfigError, match=r"run.yaml:[45]: checkpoint"):
        load_run(run)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("compile: deepcompile", "DeepCompile takes out the hooks .* `layers` compiles each layer"),
        ("compile: whole", "expected 'off' or 'layers'"),
        ("dtype: fp8", "weights are kept in 16 bits at least: `fp8: true` with `dtype: bf16`"),
        ("compile: layers, mlp_tile: auto", "either `model.compile` or `model.mlp_tile`"),
    ],
)
def test_what_other_trainers_compile_and_round_is_answered(tmp_path: Path, model: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_run(write(tmp_path, GOOD.replace("tiny-llama", f"tiny-llama, {model}")))


def test_a_resume_may_compile_but_not_round(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    recorded = identity.fingerprints(load_run(file).config, "data")
    assert identity.differences(recorded, load_run(file, ["model.compile=layers"]).config) == {}
    assert identity.differences(recorded, load_run(file, ["model.fp8=true"]).config) == {"model.fp8": (False, True)}
    compiled = identity.fingerprints(load_run(file, ["model.compile=layers"]).config, "data")
    tiled = load_run(file, ["model.mlp_tile=auto"]).config  # does not go with compiled layers
    assert identity.differences(compiled, tiled) == {}


@pytest.mark.parametrize(
    "override",
    [
        f"cluster.workers={'9' * 400}",
        f"cluster.workers=[1, {'9' * 400}]",
        f"cluster.host_memory={'9' * 400}GB",
        "cluster.host_memory=0.1B",
        f"checkpoint.every={'9' * 400}min",
        f"train.max_steps={'9' * 400}",
        f"deepspeed.overrides={{zero_optimization: {{reduce_bucket_size: -{'9' * 400}}}}}",
    ],
)
def test_no_number_of_a_machine_or_a_clock_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write(tmp_path, GOOD), [override])
    assert len(str(caught.value).partition("': ")[2]) < 300


@pytest.mark.parametrize(("name", "said"), [("zeroo3", "did you mean 'zero3'"), ("fastest", "presets: zero")])
def test_a_preset_that_there_is_not_is_refused_where_the_file_is_read(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"run.yaml:7: deepspeed.preset: no such preset as '{name}'; {said}"):
        load_run(write(tmp_path, GOOD + f"deepspeed: {{preset: {name}}}\n"))
    assert load_run(write(tmp_path, GOOD + "deepspeed: {preset: mine.json}\n"))
