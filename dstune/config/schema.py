"""The run file: every key, its type, default, unit and meaning. `dstune schema` prints it as JSON Schema."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dstune.config.adapter import AdapterSection
from dstune.config.autotp import with_autotp
from dstune.config.declined import no_deepcompile, no_fp8_weights
from dstune.config.new_tokens import NewTokens, NewTokensSection
from dstune.config.presets import known_preset
from dstune.config.section import SECTION
from dstune.config.train import TrainSection
from dstune.config.units import MOST_WORKERS, parse_every, place, size_bytes
from dstune.paths import is_address

_FILE = "file://"


class Section(BaseModel):
    """A part of the run file: typed, frozen, no unknown keys, documented under each field."""

    model_config = SECTION


class ModelSection(Section):
    """What is tuned."""

    path: str
    """A directory, a hub id, `builtin:tiny-llama` or `builtin:tiny-t5`; or another run (`runs/NAME`, `runs/NAME@STEP`), whose weights
    are read from its checkpoint. Of a run with an adapter: that adapter where this one is alike, without one here the weights with it."""
    start: str | None = None
    """That run's checkpoint; `path` is then the model that it began with. Written by dstune."""
    revision: str | None = None
    """The hub's commit: pin it, or the same run file gives another model tomorrow."""
    tokenizer: str | None = None
    """A tokenizer's directory or hub id; default: the model's own."""
    new_tokens: NewTokens = NewTokensSection()
    """Tokens to add to it: a list (`[kilopascal]`), or `{plain: [...], special: [...]}`. Each gets a row of the embeddings, which
    begins as the mean of those before; embeddings that have room for them (Qwen's) do not grow."""
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(no_fp8_weights)] = "bf16"
    """Precision of weights in the forward pass; masters and moments are fp32."""
    fp8: bool = False
    """Multiply the matrices of the layers in 8-bit floats, scaled anew at each product: on GPUs that have it (Ada, Hopper and newer),
    and faster only for wide layers with `compile: layers`. Weights stay in `dtype`; what is learnt differs slightly."""
    task: Literal["auto", "causal-lm", "seq2seq-lm"] = "auto"
    """Found from the model's config unless named."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the config, for architecture tests; builtin models are always random."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you write it here."""
    attention: Literal["auto", "eager", "sdpa", "per-example"] = "auto"
    """Attention kernel; `auto` takes the fastest that keeps packed examples apart on this device."""
    kernels: Literal["auto", "off"] | list[str] | dict[str, bool] = "auto"
    """Faster ways to compute the same. `auto` uses each that is shown to work here; a list only those in it, or an error;
    `{rotary: false}` turns one off and leaves the others to `auto`. `dstune plan` lists their names."""
    activation_checkpointing: bool | Literal["auto", "offload"] = "auto"
    """Recompute activations in the backward pass: about a third more compute, far less memory. `auto`: where the planner finds that it
    pays. `offload`: what each layer starts from waits in main memory, for sequences so long that even this does not fit the GPU."""
    compile: Annotated[Literal["off", "layers"], BeforeValidator(no_deepcompile)] = "off"
    """`layers`: torch.compile makes few kernels of what stands between the matrix products of each layer. The first step waits minutes
    for it and wants a compiler (g++; on GPUs triton and gcc): for runs of hours. Losses differ in the last digits."""
    mlp_tile: Literal["off", "auto"] | Annotated[int, Field(ge=1)] = "off"
    """Tokens that go through a feed-forward layer at a time, for long sequences; `auto`: as many as the hidden size. Same loss."""
    overrides: dict[str, Any] = {}
    """Values put over the model's config.json (`{attention_dropout: 0.0}`)."""
    adapter: AdapterSection | None = None
    """Train an adapter by peft in place of all weights; `{}` takes the defaults."""


class Source(Section):
    """One place that instruction data comes from."""

    path: str
    """File, glob, directory, address (http, s3, gs, hf, … with credentials from the environment) or hub id; relative to the run file.
    `builtin:instructions` is the quickstart's generator."""
    format: Literal[
        "auto",
        "alpaca",
        "sharegpt",
        "messages",
        "prompt_completion",
        "natural_instructions",
        "self_instruct",
        "oasst",
        "p3",
        "preference",
        "documents",
    ] = "auto"
    """How a record becomes conversations; `auto` looks at every record's keys and refuses when unsure."""
    entry: str | None = None
    """Which data of a LLaMA-Factory registry (`path` is its `dataset_info.json`): the registry's columns and tags are taken."""
    subset: str | None = None
    """Which configuration of a hub id that has several."""
    revision: str | None = None
    """A hub id's commit: pin it, or the same run file gives other data tomorrow."""
    use: Literal["chosen"] | None = None
    """`chosen`: of preference data, tune on the preferred answer. Without it such data is refused."""
    paths: Literal["all", "best"] = "all"
    """Of message trees: every path from the root to a last answer, or one: by `rank`, else by labelled quality, else by order."""
    repeat: float = Field(default=1.0, gt=0, le=10_000)
    """How often each example comes per epoch; a fraction is drawn by `train.seed`, the same in every epoch."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many records, from the top."""
    columns: dict[str, str] = {}
    """Renames, `{prompt: question, completion: answer}`: dstune's key on the left, the file's on the right. `role_tag`, `content_tag`,
    `user_tag`, `assistant_tag`, `system_tag`, `observation_tag`, `function_tag` name parts of turns; `{ignored: images}` sets one aside."""
    split: str | None = None
    """A split of a `datasets` directory or of the builtin data."""


class DeduplicateSection(Section):
    """What counts as a repetition."""

    method: Literal["exact", "near"] = "near"
    """The same text but for case and blanks; or nearly the same (MinHash over word n-grams)."""
    by: Literal["conversation", "prompt"] = "conversation"
    """What is compared: all that is said, or what is asked alone."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity from which two count as the same."""
    ngram: int = Field(default=5, ge=1, le=32)
    """Words in a shingle; of text without blanks, characters."""


class DecontaminateSection(Section):
    """What must not be trained on."""

    against: list[str | Source] = Field(min_length=1)
    """Evaluation files: paths, or sources with their settings."""
    ngram: int = Field(default=13, ge=3, le=64)
    """Words that must be the same, one after another. Shorter evaluation texts are compared whole, from 8 words (16 characters of
    Chinese) on; shorter ones are counted as unchecked."""


class SelectSection(Section):
    """Which conversations are worth their tokens."""

    budget: int | float = Field(gt=0)
    """How many are kept: a number, or a share below 1."""
    by: Literal["ifd", "diversity", "random"] = "ifd"
    """Instruction-following difficulty by a model; k-center over TF-IDF; or a draw, the control."""
    model: str | None = None
    """The causal model that `ifd` asks; default: the run's own."""
    max_ifd: float = Field(default=1.0, gt=0)
    """Above this the instruction does not help the answer: such conversations are taken last."""


class DataSection(Section):
    """From raw files to packed rows."""

    sources: list[Source] = []
    """In the user's order; each a path with its settings."""
    prepared: str | None = None
    """An existing prepared directory; then `sources` stays empty."""
    template: str | list[str] = "auto"
    """`auto` (the tokenizer's), a built-in name (chatml, llama3, …), a `.jinja` file, or texts with `{instruction}`: one is drawn each."""
    max_length: int = Field(default=4096, ge=8)
    """Tokens in a row, and the longest example that is kept; of a sequence-to-sequence model source and target together."""
    packing: Literal["auto"] | bool = "auto"
    """Several examples in a row. `auto`: yes for T5, BART and their kin and for causal models, but for recurrent ones (Mamba, Qwen 3.5),
    which keep the examples apart with kernels of their own at best (`true` where they are installed)."""
    train_on: Literal["assistant", "last", "all", "weights"] = "assistant"
    """Which tokens are targets: every assistant answer, the last one, everything, or the turns that the file gives a weight. A weight
    in the file (0 or 1, on any turn) goes before all of them."""
    turns: Literal["keep", "expand"] = "keep"
    """`expand`: one example per answer, for templates that leave earlier reasoning out."""
    clean: list[str | dict[str, Any]] = []
    """Cleaning steps in the order given, each a name or `{name: {setting: value}}`; `dstune schema --cleaning` lists them."""
    deduplicate: Literal["off", "exact", "near"] | DeduplicateSection = "off"
    """Drop repeated conversations, within and across sources; the one in the earlier source stays."""
    decontaminate: DecontaminateSection | None = None
    """Drop conversations that share long n-grams with evaluation files."""
    select: SelectSection | None = None
    """Keep only the best of what is left, by budget."""
    temperature: float = Field(default=1.0, ge=1.0, le=100.0)
    """Mixing: sources are drawn as their size to the power of 1/temperature; 1 leaves them as they are."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """Examples above `max_length`. `error` drops and lists them up to 1% of a source, and refuses above; `split` lays documents
    into several examples (conversations it drops)."""
    control_tokens: Literal["encode", "error", "allow"] = "encode"
    """A control token spelled in content: encoded as ordinary text and counted, refused, or let through as control token."""
    bad_rows: Literal["error", "skip"] = "error"
    """A record that cannot be read or understood: stop, or list it in rejects.jsonl and go on."""
    lossy_text: Literal["error", "skip", "allow"] = "error"
    """Text that this tokenizer cannot give back (lost characters): stop, drop and list, or only count."""
    validation: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | list[Source], AfterValidator(lambda some: some or 0.0)
    ] = 0.0
    """A fraction of the examples, drawn by seed, or sources of their own; an empty list is none."""
    num_processes: int | None = Field(default=None, ge=1)
    """Processes that render and tokenise; default: the cores of this machine. Does not change the result."""
    workers: Literal["local", "ray"] = "local"
    """Where they run: here, or on the CPUs of the Ray cluster in `cluster.address`. Does not change the result."""
    max_record_bytes: int = Field(default=64 << 20, ge=1024)
    """A record longer than this is refused before it is parsed."""

    @model_validator(mode="after")
    def _one_origin(self) -> "DataSection":
        if bool(self.sources) == (self.prepared is not None):
            raise ValueError("give either `sources` or `prepared`")
        return self


class DeepspeedSection(Section):
    """How states are partitioned and offloaded."""

    preset: Annotated[str, AfterValidator(known_preset)] = "auto"
    """`auto` (what the planner takes for the model and the machines: `dstune plan` says which, and why), a name in ds_configs/ (zero1,
    zero2, zero3, zero3-offload-optimizer, …), or a JSON file of yours."""
    overrides: dict[str, Any] = {}
    """Put over the preset, key by key."""


class ClusterSection(Section):
    """Where it runs."""

    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_WORKERS)] | tuple[int, int] = "auto"
    """`auto` (every GPU; without GPUs one), a number, or `[min, max]`."""
    nodes: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    """Number of machines; with `gpus_per_node`, in place of `workers`."""
    gpus_per_node: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    """GPUs, and so workers, on each."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Workers that share each row (Ulysses), each with the activations of a piece of it: for rows too long for one GPU. Divides the
    workers and the model's attention heads; wants packing, and a causal model that looks at other tokens in its attention alone."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Workers that hold each of the model's layers between them and see the same rows (DeepSpeed's AutoTP, with ZeRO 1 or 2): for
    models too large for one GPU's ZeRO-2. Divides the workers and the model's heads; neighbours, so best on one machine."""
    gpu: str | None = None
    """What they are (h100-80gb, a100-40gb, …), for the planner where it cannot look at them: on a laptop, or a head without GPUs."""
    host_memory: Annotated[int, BeforeValidator(size_bytes)] | None = None
    """Of one machine (`1TB`), likewise."""
    cpus_per_worker: int | None = Field(default=None, ge=1)
    """Cores, and so threads, of a worker; default: one, and of this machine's GPUs each an equal part of its cores."""
    max_failures: int = Field(default=3, ge=0)
    """Automatic restarts after failures that made no new commit in between."""
    address: str | None = None
    """A Ray cluster's address; default: an embedded Ray."""

    @model_validator(mode="after")
    def _one_size(self) -> "ClusterSection":
        if self.nodes is not None and self.workers != "auto":
            raise ValueError("give either `workers` or `nodes` and `gpus_per_node`")
        if self.gpus_per_node is not None and self.nodes is None:
            raise ValueError("`gpus_per_node` wants `nodes` too")
        if isinstance(self.workers, tuple) and not 1 <= self.workers[0] <= self.workers[1] <= MOST_WORKERS:
            raise ValueError(f"`workers: [min, max]` wants 1 <= min <= max <= {MOST_WORKERS:,}")
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> "ClusterSection":
        counts = self.workers if isinstance(self.workers, tuple) else (self.workers,)
        if self.nodes is not None:
            counts = (self.nodes * (self.gpus_per_node or 1),)
        for key in ("sequence_parallel", "tensor_parallel"):
            if any(isinstance(count, int) and count % getattr(self, key) for count in counts):
                raise ValueError(f"`{key}: {getattr(self, key)}` wants a multiple of so many workers")
        return self

    @property
    def group(self) -> int:
        """Workers in a row that take the same rows."""
        return self.sequence_parallel * self.tensor_parallel


Every = Annotated[int | str, BeforeValidator(parse_every)]
Place = Annotated[str, AfterValidator(place)]


class CheckpointSection(Section):
    """What is kept."""

    every: Every = 200
    """Steps, or a duration such as `30min`."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints that stay."""
    keep_every: int | None = Field(default=None, ge=1)
    """Saves at steps that this divides stay for ever (`1000`, with `every: 200`)."""
    best: Literal["loss"] | None = None
    """A metric of the validation (`loss`), which is then measured before every save; its best checkpoint is kept too."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the metric's smallest or largest value is the best."""
    dir: Place | None = None
    """Where checkpoints go: a directory that all nodes share, or an address (s3, gs, … with credentials from the environment), below
    which they are uploaded behind the training. A run whose own directory is lost goes on from them: `dstune train` with the same run
    file. Default: the run directory's `checkpoints/`."""
    staging: Place | None = None
    """Where checkpoints are written before they are uploaded to the address in `dir`; may be a disk of each node's own. Default: the
    run directory's `checkpoints/`."""
    background: Literal["auto"] | bool = "auto"
    """Write behind the training, from a copy in host memory (12 bytes a parameter over all workers with AdamW); `auto`: where that
    memory is free. Otherwise the training waits for the disk."""
    weights_only: bool = False
    """Keep the fp32 weights (and their average) alone, of AdamW's states a third: a resume is not exact then, its optimizer begins
    anew from them."""
    on_error: Literal["stop", "continue"] = "stop"
    """After a save that failed: stop (resumable from the last good one), or warn and go on."""

    @model_validator(mode="after")
    def _steps_that_are_saved(self) -> "CheckpointSection":
        if self.keep_every is not None and isinstance(self.every, str):
            raise ValueError("`keep_every` counts steps: give `every` in steps too, or hardly a save falls on one")
        return self

    @property
    def address(self) -> str | None:
        """`dir` where it is an address; a `file://` one is a directory like any other."""
        return self.dir if self.dir and is_address(self.dir) and not self.dir.startswith(_FILE) else None

    @property
    def directory(self) -> str | None:
        """The directory on a disk that is written to, as the run file names it; None: the run directory's own."""
        return self.staging if self.address else self.dir and self.dir.removeprefix(_FILE)

    @model_validator(mode="after")
    def _staging_is_on_the_way(self) -> "CheckpointSection":
        if self.staging is not None and (self.address is None or is_address(self.staging)):
            raise ValueError("`staging` goes with an address in `dir` (s3://bucket/runs), and is a directory itself")
        return self


class ValidateSection(Section):
    """Loss on held-out rows."""

    every: int = Field(default=200, ge=1)
    """Steps between two evaluations; there is one at the start and one at the end too."""
    max_rows: int | None = Field(default=None, ge=1)
    """At most so many rows of the validation set."""


class ReportSection(Section):
    """What is shown."""

    console: Literal["auto", "rich", "plain"] = "auto"
    """Progress as a live line, or a line per step; `auto` looks whether stderr is a terminal."""


class RunConfig(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Letters, digits, `.`, `_`, `-`; names the run directory."""
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    deepspeed: DeepspeedSection = DeepspeedSection()
    cluster: ClusterSection = ClusterSection()
    checkpoint: CheckpointSection = CheckpointSection()
    validate_: ValidateSection = Field(default=ValidateSection(), alias="validate")
    report: ReportSection = ReportSection()
    site: str | None = None
    """A site file's name or path: what belongs to a place, not to a run."""
    runs_dir: str = "runs"
    """Where run directories go; relative to the run file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _autotp_is_said_of_the_workers(cls, values: Any) -> Any:
        """`deepspeed.overrides.tensor_parallel.autotp_size` is `cluster.tensor_parallel`, where that is not given."""
        return values | {"cluster": cluster} if (cluster := with_autotp(values)) else values

    @model_validator(mode="after")
    def _noise_knows_whole_examples(self) -> "RunConfig":
        if self.train.neftune_alpha is not None and self.cluster.sequence_parallel > 1:
            raise ValueError(
                "give either `train.neftune_alpha` or `cluster.sequence_parallel`: its noise counts whole examples"
            )
        return self

    @model_validator(mode="after")
    def _compiled_layers_are_whole(self) -> "RunConfig":
        if self.model.compile == "layers" and self.model.mlp_tile != "off":
            raise ValueError("give either `model.compile` or `model.mlp_tile`: how many tiles there are is in no graph")
        return self

    @model_validator(mode="after")
    def _frozen_weights_are_kept_somewhere(self) -> "RunConfig":
        if self.train.freeze and self.model.adapter is not None:
            raise ValueError("give either `train.freeze` or `model.adapter`: an adapter leaves all else frozen")
        if self.train.freeze and (self.model.init == "random" or self.model.path.startswith("builtin:")):
            raise ValueError(
                "`train.freeze` wants a pretrained model: frozen weights are in no checkpoint but in its files"
            )
        return self


class SlurmSite(Section):
    """What `sbatch` must be told at this place."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """`--time`, as Slurm writes it: `12:00:00`."""
    signal_seconds: int = Field(default=180, ge=1)
    """Seconds before the time limit at which Slurm warns; allow a minute more than a save needs."""
    options: dict[str, str | int] = {}
    """Further sbatch options by their long names (`{constraint: h100}`). `mem: 0` is all of a node's memory: where a job does not say,
    many clusters give it little for each core, and kill it when it takes more; `dstune plan` says what a machine needs."""


class SiteConfig(Section):
    """A site file: partitions, directories, variables of one place."""

    slurm: SlurmSite = SlurmSite()
    setup: list[str] = []
    """Shell lines that a batch script runs first (`module load cuda`): yours, taken as written."""
    env: dict[str, str] = {}
    """Variables for every worker (fabric, caches). No secrets: those come from your environment."""
    ray_address: str | None = None
    """The Ray cluster of this place, for `--to ray` and `--address auto`."""
    cache_dir: str | None = None
    """`$DSTUNE_CACHE` at this place."""
