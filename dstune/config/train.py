"""`train` of the run file, and the settings that each optimizer knows."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from dstune.config.section import SECTION

Beta = Annotated[float, Field(ge=0, lt=1)]

_OPTIMIZER_SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
    "sgd": {"momentum": 0.9},
    "lion": {"betas": (0.9, 0.99)},
    "adagrad": {"eps": 1e-10},
    "muon": {"momentum": 0.95, "betas": (0.9, 0.999), "eps": 1e-8},
    "adafactor": {"eps": 1e-30, "scale_parameter": True},
    "adamw8bit": {"betas": (0.9, 0.999), "eps": 1e-8},
}
"""The settings that each optimizer knows, with its defaults; the others' do not belong to it."""
_RELATIVE_LR = 1e-3
"""Where updates are relative to the parameters: about 2e-5 of the weights of a language model, whose root mean square is near 0.02."""
_NAMED_ADAMW8BIT = ("adam8bit", "adam_8bit", "adamw_8bit", "adamw-8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
"""What other trainers call it, or what is nearest to it."""

_DECAY_RATIO = 0.2
_DECAY_SHAPE = "1-sqrt"
"""What Hägele et al. 2024 ("Scaling laws and compute-optimal training beyond fixed training durations") found best, or near it."""


class TrainSection(BaseModel):
    """How it is tuned."""

    model_config = SECTION

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the rows; 1 when `max_steps` is not given either."""
    max_steps: int | None = Field(default=None, ge=1)
    """Steps to take, in place of `epochs`."""
    global_batch_size: int = Field(default=64, ge=1)
    """Rows per step over all workers."""
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows per forward pass and worker; does not change the loss, but for noise drawn anew in each pass (dropout, NEFTune).
    `auto`: as the planner finds, on CPUs about 8,192 tokens."""
    lr: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate. Of Adafactor (1e-3) relative to each parameter's root mean square, unless `scale_parameter: false`."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. `cosine` and `linear` fall to the last step; `wsd` stays at the peak and falls at the end only, so that
    a run can be lengthened (`dstune resume RUN train.max_steps=…`) from any step before its decay."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """What the schedule falls to behind the last step, as a share of `lr`."""
    decay_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of all steps in which `wsd` falls (0.2)."""
    decay_shape: Literal["1-sqrt", "linear", "cosine"] | None = None
    """How `wsd` falls (1-sqrt: fast at first)."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of all steps that warm up linearly; 0 when `warmup_steps` is not given either."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps that warm up, in place of `warmup_ratio`."""
    optimizer: Literal["adamw", "sgd", "lion", "adagrad", "muon", "adafactor", "adamw8bit"] = "adamw"
    """The update rule. Muon's is for hidden matrices, the others (embeddings, head, vectors) take AdamW's; Adafactor keeps nearly nothing
    beside the weights; adamw8bit keeps AdamW's moments in 8 bits, but for those of embeddings and of what is small."""
    states: Literal["fp32"] = "fp32"
    """Precision of masters and moments."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """On matrices only, never on biases and norms; decoupled, but for SGD and Adagrad, which add it to the gradient."""
    betas: tuple[Beta, Beta] | None = None
    """Decay rates of AdamW, in 8 bits or not, and Muon's part of it (0.9, 0.999), and of Lion (0.9, 0.99)."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of AdamW, in 8 bits or not, and Muon's part of it (1e-8), and of Adagrad (1e-10); of Adafactor the least mean
    square of a gradient's row, column or element (1e-30)."""
    momentum: Beta | None = None
    """SGD's (0.9), Muon's (0.95)."""
    scale_parameter: bool | None = None
    """Whether Adafactor's updates are relative to each parameter's root mean square (true, as `torch.optim.Adafactor`'s); with `false`
    `lr` means what it means with AdamW, as in transformers' Trainer: matrices that begin at zero (LoRA's B) learn faster then."""
    freeze: list[str] = []
    """Parameters that stay as they are: patterns on their names (`model.embed_tokens.*`, `model.layers.[0-3].*`)."""
    lr_scales: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Learning rates by layer: patterns on parameters' names, each with the factor on `lr` (`{model.layers.[0-3].*: 0.1, lm_head.*:
    2}`; with an adapter `{"*.lora_B.*": 16}` is LoRA+). A parameter that several fit takes the product; others take `lr`."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Keep an average of the weights beside them (4 bytes a parameter more, over all workers): behind each update
    average = ema * average + (1 - ema) * weights, so of about the last 1 / (1 - ema) updates. It begins at the first weights,
    checkpoints keep it, and `dstune export --weights ema` writes it."""
    neftune_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Noise on the input embeddings while training (NEFTune; 5 to 15 is usual): uniform in +-alpha / sqrt(tokens * width), of each
    example's own length, however it is packed."""
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Clip the global gradient norm; 0: never."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Seeds order, initialisation and dropout."""
    deterministic: bool = False
    """Deterministic kernels on GPUs (slower); on a CPU training is deterministic anyway."""
    nonfinite_limit: int = Field(default=5, ge=1)
    """Stop after so many steps in a row whose loss or gradient is not finite; each is skipped and named."""
    profile: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """`[from, to]`: trace these steps, both included, with torch's profiler: `profile/rank-N.json` in the run directory."""

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_optimizer(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("optimizer")).lower() in _NAMED_ADAMW8BIT:
            came = f"the optimizer {values['optimizer']} is bitsandbytes'"
            raise ValueError(f"{came}; `adamw8bit` keeps its moments in blocks of 8 bits too, on every device")
        known = _OPTIMIZER_SETTINGS.get(str(values.get("optimizer", "adamw"))) if isinstance(values, dict) else None
        if known is None:
            return values
        for key in dict.fromkeys(key for settings in _OPTIMIZER_SETTINGS.values() for key in settings):
            if values.get(key) is not None and key not in known:
                *others, last = (name for name, settings in _OPTIMIZER_SETTINGS.items() if key in settings)
                owners = f"{', '.join(others)} and {last}" if others else last
                raise ValueError(f"`{key}` belongs to {owners}, not to {values.get('optimizer', 'adamw')}")
        values = values | {key: default for key, default in known.items() if values.get(key) is None}
        return values if not values.get("scale_parameter") or "lr" in values else values | {"lr": _RELATIVE_LR}

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_schedule(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        schedule = values.get("schedule", "cosine")
        defaults = {"decay_ratio": _DECAY_RATIO, "decay_shape": _DECAY_SHAPE}
        if schedule == "wsd":
            return values | {key: default for key, default in defaults.items() if values.get(key) is None}
        for key in defaults:
            if values.get(key) is not None:
                raise ValueError(f"`{key}` belongs to wsd, not to {schedule}")
        if schedule == "constant" and values.get("min_lr_ratio"):
            raise ValueError("`min_lr_ratio` belongs to cosine, linear and wsd: constant never falls")
        return values

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError("`profile: [from, to]` wants from <= to")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give either `epochs` or `max_steps` (null takes one away)")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("give either `warmup_ratio` or `warmup_steps` (null takes one away)")
        if (self.warmup_ratio or 0.0) + (self.decay_ratio or 0.0) > 1:
            raise ValueError("`warmup_ratio` and `decay_ratio` are more than all steps together")
        return self
