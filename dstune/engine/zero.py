"""`protocols.Engine` on DeepSpeed ZeRO 1, 2 and 3, with torch's fused AdamW: nothing is compiled, on any device."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from dstune.engine.construction import complete, stage_of
from dstune.engine.parameters import full_shape
from dstune.engine.partitions import FlatGroupPartitions, Partitions, Stage3Partitions, pieces
from dstune.engine.world import World
from dstune.errors import ConfigError, Problem
from dstune.protocols import Slice, StepResult

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""The training states of AdamW: masters, first and second moments."""

_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroEngine:
    """The partitioned model and AdamW of one worker.

    `names` maps a run-time parameter name to the one that `save_pretrained` writes; names not in it stay.
    `ds_config` may leave out what `construction.complete` adds; gradients are clipped to its `gradient_clipping`.
    The model's dtype is that of its parameters. Weight decay acts on matrices only. Parameters without
    `requires_grad` are neither updated nor part of the slices.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ds_config: Mapping[str, Any],
        world: World,
        names: Mapping[str, str] | None = None,
    ) -> None:
        import deepspeed

        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not trainable:
            raise ConfigError(Problem("model", "has no trainable parameter"))
        config = complete(ds_config, trainable[0].dtype)
        groups = _decay_groups(trainable, weight_decay)
        adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        engine, zero, _, _ = deepspeed.initialize(
            model=module, optimizer=adamw, config=config, dist_init_required=False
        )
        self._engine: Any = engine
        self._zero: Any = zero
        self._adamw = adamw
        self._names = dict(names or {})
        self._partitions: Partitions = (
            Stage3Partitions(self._zero, world.rank) if stage_of(config) == 3 else FlatGroupPartitions(self._zero)
        )
        self._optimizer_steps = 0
        self._used = False
        self._pieces = list(pieces(self._partitions, module))
        self._set_moments(steps=0)

    @property
    def module(self) -> Any:
        """The model to call. Call it itself, not a part of it: DeepSpeed prepares each pass in its own forward."""
        return self._engine

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of the scalar `loss`; gradients are averaged over the workers after the `last` one."""
        self._used = True
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        """Clip, update with `lr`, clear the gradients. A non-finite gradient anywhere skips the update on every worker.

        `grad_norm` is infinite where the update was skipped.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._engine.step()
        skipped = not self._engine.was_step_applied()
        if skipped:
            self._partitions.drop_gradients()
        self._optimizer_steps += not skipped
        return StepResult(grad_norm=float(self._engine.get_global_grad_norm()), skipped=skipped)

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, skipped ones left out."""
        return self._optimizer_steps

    def slices(self) -> Iterator[Slice]:
        """Views of this worker's fp32 masters and moments: for each flat tensor, state by state, parameter by parameter."""
        for flat in self._partitions.flats():
            for state in STATES:
                values = self._state(state, flat)
                for name, piece in self._pieces:
                    if piece.flat is flat:
                        tensor = values.narrow(0, piece.start, piece.length)
                        yield Slice(state, self._names.get(name, name), piece.shape, piece.offset, tensor)

    def load(self, fill: Callable[[Slice], None], optimizer_steps: int) -> None:
        """Have `fill` write every slice, then refresh the forward weights. Only before the first forward pass.

        A collective call. `optimizer_steps`: updates made so far, for Adam's bias correction.
        """
        assert not self._used and self._optimizer_steps == 0, "only a fresh engine can be loaded"
        with torch.no_grad():
            for piece in self.slices():
                fill(piece)
            self._set_moments(optimizer_steps)
            self._partitions.refresh()
        self._optimizer_steps = optimizer_steps

    def extra_state(self) -> dict[str, Any]:
        """fp16's loss scaler; empty for the other types."""
        scaler = self._loss_scaler()
        return {} if scaler is None else {"loss_scaler": {key: getattr(scaler, key) for key in _LOSS_SCALER_FIELDS}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take what `extra_state` gave; a scaler's state is ignored where this engine has none (another dtype)."""
        scaler = self._loss_scaler()
        if scaler is not None and "loss_scaler" in state:
            for key in _LOSS_SCALER_FIELDS:
                setattr(scaler, key, state["loss_scaler"][key])

    def _loss_scaler(self) -> Any | None:
        if not self._engine.fp16_enabled():
            return None
        scaler = self._zero.loss_scaler
        return scaler if scaler.dynamic else None

    def _state(self, state: str, flat: torch.Tensor) -> torch.Tensor:
        return flat.detach() if state == "fp32" else self._adamw.state[flat][state]

    def _set_moments(self, steps: int) -> None:
        """Create the moments that AdamW would create in its first step (zeros), and set its count of steps."""
        for flat in self._partitions.flats():
            state = self._adamw.state[flat]
            for key in STATES[1:]:
                if key not in state:
                    state[key] = torch.zeros_like(flat, requires_grad=False)
            # fused AdamW counts in a float tensor beside the parameter.
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)


def _decay_groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with decay, vectors (biases, norms) without. A group without members is left out."""
    matrices = [parameter for parameter in parameters if len(full_shape(parameter)) >= 2]
    vectors = [parameter for parameter in parameters if len(full_shape(parameter)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
