"""Values that other trainers know for keys of ours, and that are no values here: an error says why, and what there is."""

from typing import Any

WHY_NO_DEEPCOMPILE = (
    "DeepSpeed's DeepCompile takes out the hooks that sum gradients, and sums those of the workers in 16 bits: "
    "what is learnt would depend on their number"
)
"""As version 0.19.8 has it (`deepspeed/compile/init_z3.py`, `csrc/compile/z3.cpp`)."""


def no_deepcompile(value: Any) -> Any:
    """`value` of `model.compile`. Raises ValueError for DeepCompile."""
    if value == "deepcompile":
        raise ValueError(f"{WHY_NO_DEEPCOMPILE}; `layers` compiles each layer and leaves them as they are")
    return value


def no_fp8_weights(value: Any) -> Any:
    """`value` of `model.dtype`. Raises ValueError for 8 bits."""
    if isinstance(value, str) and value.lower().startswith(("fp8", "float8")):
        raise ValueError("weights are kept in 16 bits at least: `fp8: true` with `dtype: bf16` multiplies them in 8")
    return value
