"""`protocols.Engine` on DeepSpeed ZeRO 1, 2 and 3, with the optimizers of `optimizers.py`: nothing is compiled, on any device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dstune.engine import communication, leaves, tensor_parallel
from dstune.engine.average import Average
from dstune.engine.construction import complete, stage_of
from dstune.engine.heap import kept_heap
from dstune.engine.one_order import InOneOrder
from dstune.engine.optimizers import Settings, rule_of
from dstune.engine.parameters import forget_copies
from dstune.engine.partitions import FlatGroupPartitions, Partitions, Piece, Stage3Partitions, is_bf16_class, pieces
from dstune.engine.reduction import reduce_directly, take_sums_as_they_are
from dstune.engine.sliced import Sliced
from dstune.engine.states import BY_ELEMENT, Part, State
from dstune.engine.swapping import SwapFolder, require_buffers
from dstune.engine.unvisited import Unvisited
from dstune.engine.world import World
from dstune.errors import CheckpointError, ConfigError, Problem
from dstune.planning.reachable import unswappable, uses_nvme
from dstune.planning.tensor_parallel import uncuttable
from dstune.protocols import AVERAGE, WEIGHTS, Slice, StepResult

_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroEngine:
    """The partitioned model and optimizer of one worker.

    `names` maps a run-time parameter name to the one that `save_pretrained` writes; names not in it stay.
    `ds_config` may leave out what `construction.complete` adds; gradients are clipped to its `gradient_clipping`.
    The model's dtype is that of its parameters. Weight decay acts on matrices only. `lr_scales`: run-time names of
    parameters and the factors on their learning rate. `ema`: the decay of the weights' average, one more state of the
    slices; None: there is none. Parameters without `requires_grad` are neither updated nor part of the slices. `planned_bytes`:
    what the process is planned to take; a worker on a processor keeps freed memory within it.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        lr: float,
        ds_config: Mapping[str, Any],
        world: World,
        optimizer: str = "adamw",
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        momentum: float | None = None,
        scale_parameter: bool | None = None,
        weight_decay: float = 0.0,
        lr_scales: Mapping[str, float] | None = None,
        ema: float | None = None,
        names: Mapping[str, str] | None = None,
        planned_bytes: int | None = None,
    ) -> None:
        import deepspeed

        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not trainable:
            raise ConfigError(Problem("model", "has no trainable parameter"))
        config = complete(ds_config, trainable[0].dtype)
        if problems := unswappable(config, optimizer) + uncuttable(config, optimizer):
            raise ConfigError(problems)
        if uses_nvme(config):
            self._swap = SwapFolder(Path(config["zero_optimization"]["offload_optimizer"]["nvme_path"]))
            self._swap.put_into(config, more_states=int(ema is not None))
        tensor_parallel.prepare(config, module)
        if stage_of(config) == 3:
            for name in leaves.routed_modules(module):
                leaves.gather_whole(module.get_submodule(name))
        settings = Settings(name=optimizer, betas=betas, eps=eps, momentum=momentum, scale_parameter=scale_parameter)
        self._rule = rule_of(settings)
        self._optimizer = self._rule.build(self._rule.groups(module, weight_decay, lr_scales or {}), lr)
        self._average = None if ema is None else Average(self._optimizer, ema)
        engine, zero, _, _ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=config, dist_init_required=False
        )
        tensor_parallel.trust_rows(engine, config)
        self._engine: Any = engine
        self._zero: Any = zero
        self._communication = communication.timed(world.device)
        communication.watch(zero, stage_of(config), self._communication)
        self._unvisited = _with_right_gradients(zero, module, stage_of(config), world.device)
        self.leaf_modules: Sequence[str] = leaves.gathered_whole(module) if stage_of(config) == 3 else []
        """Names of the modules that are gathered whole, whichever of their parts a worker's tokens visit."""
        self._optimizer_name = optimizer
        self._names = dict(names or {})
        forget_copies(module)
        require_buffers(module)
        self._cuts = tensor_parallel.cuts_of(module, config, world.device)
        self._partitions: Partitions = (
            Stage3Partitions(self._zero, world.rank) if stage_of(config) == 3 else FlatGroupPartitions(self._zero)
        )
        self._optimizer_steps = 0
        self._heap = kept_heap(world.device.type, planned_bytes)
        self._used = False
        self._pieces = pieces(self._partitions, module)
        for flat, its_pieces in self._pieces.items():
            with self._partitions.resident(flat, changed=True):
                self._rule.prepare(self._optimizer, flat, self._group_of(flat), its_pieces)
                if self._average:
                    self._average.start(flat)
        if scaler := self._loss_scaler():
            # The loop counts what is skipped, says so, and gives up; DeepSpeed would raise in the middle of a step.
            scaler.raise_error_at_min_scale = False
        if isinstance(self._optimizer, Sliced):
            self._optimizer.place(self._pieces, world.device)

    @property
    def module(self) -> Any:
        """The model to call. Call it itself, not a part of it: DeepSpeed prepares each pass in its own forward."""
        return self._engine

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of the scalar `loss`; gradients are averaged over the workers after the `last` one."""
        self._used = True
        self._look_at_heap()
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        self._look_at_heap()

    def step(self, lr: float) -> StepResult:
        """Clip, update with `lr`, clear the gradients. A non-finite gradient anywhere skips the update on every worker.

        `grad_norm` is infinite where the update was skipped.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler = self._loss_scaler()
        had_room = scaler is not None and scaler.cur_scale > scaler.min_scale
        if self._unvisited:
            self._unvisited.complete()
        self._engine.step()
        skipped = not self._engine.was_step_applied()
        if skipped:
            self._partitions.drop_gradients()
        self._optimizer_steps += not skipped
        self._look_at_heap()
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(grad_norm=norm, skipped=skipped, scale_falls=skipped and had_room)

    def _look_at_heap(self) -> None:
        if self._heap:
            self._heap.look()

    def communication_seconds(self) -> float:
        """For how long this process has stood still for collectives so far; see `communication` for what is counted."""
        return self._communication.seconds()

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, skipped ones left out."""
        return self._optimizer_steps

    def slices(self) -> Iterator[Slice]:
        """What this worker writes of masters and states: for each flat tensor, state by state, parameter by parameter.

        NOTE: where states are on NVMe a view holds only until the next one is asked for: copy each as it comes.
        """
        for flat, its_pieces in self._pieces.items():
            with self._partitions.resident(flat):
                for name, state, kept in self._states_of(flat):
                    for piece in its_pieces:
                        if part := state.saved(kept, piece):
                            yield from (self._slice(name, piece, each) for each in self._cuts.saved(piece.name, part))

    def load(self, fill: Callable[[Slice], None], optimizer_steps: int) -> None:
        """Have `fill` write every slice, then refresh the forward weights. Only before the first forward pass.

        A collective call. `optimizer_steps`: updates made so far, for Adam's bias correction.
        """
        assert not self._used and self._optimizer_steps == 0, "only a fresh engine can be loaded"
        with torch.no_grad():
            for flat in self._pieces:
                with self._partitions.resident(flat, changed=True):
                    self._load(flat, fill)
                self._rule.set_steps(self._optimizer, flat, optimizer_steps)
            self._partitions.refresh()
        self._optimizer_steps = optimizer_steps

    def _load(self, flat: torch.Tensor, fill: Callable[[Slice], None]) -> None:
        for name, state, kept in self._states_of(flat):
            for piece in self._pieces[flat]:
                with state.loaded(kept, piece) as part:
                    for each in self._cuts.loaded(piece.name, part) if part else ():
                        fill(self._slice(name, piece, each))

    def _states_of(self, flat: torch.Tensor) -> Iterator[tuple[str, State, Any]]:
        """Name and kind of each state, and what is kept of it for `flat`."""
        kept = self._optimizer.state[flat]
        yield WEIGHTS, BY_ELEMENT, flat.detach()
        if self._average:
            yield AVERAGE, BY_ELEMENT, kept[AVERAGE]
        for name, state in self._rule.states_of(self._group_of(flat)).items():
            yield name, state, kept[name]

    def _slice(self, state: str, piece: Piece, part: Part) -> Slice:
        return Slice(state, self._names.get(piece.name, piece.name), part.shape, part.offset, part.tensor)

    def _group_of(self, flat: torch.Tensor) -> dict[str, Any]:
        return self._optimizer.param_groups[self._partitions.group(flat)]

    def extra_state(self) -> dict[str, Any]:
        """The optimizer's name, and fp16's loss scaler."""
        state: dict[str, Any] = {"optimizer": self._optimizer_name}
        scaler = self._loss_scaler()
        if scaler is not None:
            state["loss_scaler"] = {key: getattr(scaler, key) for key in _LOSS_SCALER_FIELDS}
        return state

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take what `extra_state` gave; a scaler's state is ignored where this engine has none (another dtype).

        Raises CheckpointError where another optimizer wrote it.
        """
        written = state.get("optimizer", "adamw")
        if written != self._optimizer_name:
            came = f"the checkpoint has the states of {written}, and the run wants {self._optimizer_name}"
            do = f"Resume with {written}; for another optimizer export the weights and start a new run from them."
            raise CheckpointError(Problem("train.optimizer", came, written, do))
        scaler = self._loss_scaler()
        if scaler is not None and "loss_scaler" in state:
            for key in _LOSS_SCALER_FIELDS:
                setattr(scaler, key, state["loss_scaler"][key])

    def _loss_scaler(self) -> Any | None:
        if not self._engine.fp16_enabled():
            return None
        scaler = self._zero.loss_scaler
        return scaler if scaler.dynamic else None


def _with_right_gradients(
    zero: Any, module: torch.nn.Module, stage: int, device: torch.device
) -> Unvisited | InOneOrder | None:
    """DeepSpeed's optimizer with our way of its gradients; what is returned is to be completed before each update."""
    if stage < 3:
        # The class for ZeRO-1 in bf16 sums whole flat tensors, zeros where nothing was visited.
        return None if is_bf16_class(zero) else InOneOrder(zero, module)
    take_sums_as_they_are(zero)
    if device.type == "cpu":
        reduce_directly(zero)
    return Unvisited(zero)
