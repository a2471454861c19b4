"""`model.adapter` of the run file."""

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from dstune.config.section import SECTION


class AdapterSection(BaseModel):
    """Small trainable matrices beside the model's own weights, which stay as they are: `W x + scale * B A x`."""

    model_config = SECTION

    kind: Literal["lora", "rslora", "dora"] = "lora"
    """`lora`: scale = alpha / rank; `rslora`: alpha / sqrt(rank), for high ranks; `dora`: lora, and a trained length for each
    output (slower; often better at low ranks)."""
    rank: int = Field(default=16, ge=1)
    """Columns of B and rows of A."""
    alpha: int = Field(default=32, ge=1)
    """How much the adapter counts: see `kind`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of A's inputs that are left out at random while training."""
    targets: Literal["auto"] | list[str] = "auto"
    """Which linear layers: `auto` takes all that learn but the output head; or names and patterns (`q_proj`, `layers.1?.mlp.*`)."""
    modules_to_save: list[str] = []
    """Modules that are trained in full and kept with the adapter, by the same patterns (`embed_tokens`, `lm_head`)."""

    @field_validator("kind", mode="before")
    @classmethod
    def _no_4bit(cls, kind: Any) -> Any:
        if kind == "qlora":
            raise ValueError(
                "weights in 4 bits are blocks with a scale each (bitsandbytes, on GPUs alone), which ZeRO-3 cannot cut by element; take "
                "`lora`: ZeRO-3 splits its frozen weights over the workers (2 bytes a parameter, 0.5 each on four), and "
                "`deepspeed.preset: zero3-offload-all` keeps them in the hosts' memory"
            )
        return kind

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: Any) -> Any:
        if targets == []:
            raise ValueError("names no layer; leave it out for all of them")
        return targets
