"""What models raise, of whatever architecture, when something is tried on them."""

from huggingface_hub.errors import StrictDataclassError

FAILURES = (
    ValueError, RuntimeError, TypeError, NotImplementedError, KeyError, IndexError, AttributeError, ImportError, AssertionError,
    StrictDataclassError,
)  # fmt: skip
"""Of a model that cannot do what an experiment asks of it: a reason to go on without, and no fault of ours."""
