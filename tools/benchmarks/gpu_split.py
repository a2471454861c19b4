"""AdamW whose moments are in main memory for a share of the elements: fetched to the device for the update, and brought back.

ZeRO-3 hands an optimizer one flat tensor after the other, in the same order in every step. While one is updated, the moments of the
next are on their way in and those of the one before on their way out, each on a stream of its own; the first of a step are fetched
behind the backward pass. Nothing is compiled, and the update is torch's own, on the device.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim.adamw import adamw

_MOMENTS = ("exp_avg", "exp_avg_sq")


class SplitAdamW(torch.optim.Optimizer):
    """`host_share`: of the elements of all moments, 0 to 1, that stay in main memory. The tensors that are met first stay on the device."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        host_share: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._share = host_share
        self._total = sum(parameter.numel() for group in self.param_groups for parameter in group["params"])
        self._met = 0
        self._away: list[torch.Tensor] = []
        self._fetched: dict[torch.Tensor, _Fetched] = {}
        self._links: _Links | None = None

    def count(self, elements: int) -> None:
        """Say how many elements there are, where the parameters that this was made with have none (ZeRO-3's, partitioned)."""
        self._total = elements

    @property
    def host_elements(self) -> int:
        """Of the tensors met so far, those whose moments are in main memory."""
        return sum(parameter.numel() for parameter in self._away)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._meet(parameter, state)
        if not state["away"]:
            _adamw(parameter, state, [state[name] for name in _MOMENTS], group)
            return
        links = self._links = self._links or _Links(parameter.device)
        now = self._fetched.pop(parameter, None) or links.fetch(state, parameter.device)
        following = self._away[(self._place(parameter) + 1) % len(self._away)]
        if following is not parameter and following not in self._fetched:
            self._fetched[following] = links.fetch(self.state[following], parameter.device)
        links.wait_for(now)
        _adamw(parameter, state, now.moments, group)
        links.bring_back(now, state)

    def _meet(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        """Decide where the moments are: on the device until its share is full."""
        size, device = parameter.numel(), parameter.device
        here = self._met + size <= (1 - self._share) * self._total
        self._met += size
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["away"] = not here
        state["stored"] = None
        for name in _MOMENTS:
            state[name] = torch.zeros_like(parameter) if here else _host_zeros(size, device)
        if not here:
            self._away.append(parameter)

    def _place(self, parameter: torch.Tensor) -> int:
        return next(number for number, one in enumerate(self._away) if one is parameter)


class _Fetched:
    """Moments on the device, and when they are all there."""

    def __init__(self, moments: list[torch.Tensor], ready: torch.cuda.Event | None) -> None:
        self.moments, self.ready = moments, ready


class _Links:
    """The way in and the way out, each a stream of its own; on a CPU plain copies."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._inward = torch.cuda.Stream(device) if on_gpu else None
        self._outward = torch.cuda.Stream(device) if on_gpu else None

    def fetch(self, state: dict[str, Any], device: torch.device) -> _Fetched:
        with _on(self._inward) as stream:
            if stream is not None and state["stored"] is not None:
                stream.wait_event(state["stored"])
            moments = [torch.empty_like(state[name], device=device) for name in _MOMENTS]
            for moment, name in zip(moments, _MOMENTS, strict=True):
                moment.copy_(state[name], non_blocking=True)
            return _Fetched(moments, None if stream is None else stream.record_event())

    def wait_for(self, fetched: _Fetched) -> None:
        """Have the stream that computes wait until they are there."""
        if fetched.ready is not None:
            current = torch.cuda.current_stream()
            current.wait_event(fetched.ready)
            for moment in fetched.moments:
                moment.record_stream(current)

    def bring_back(self, fetched: _Fetched, state: dict[str, Any]) -> None:
        current = None if self._outward is None else torch.cuda.current_stream()
        with _on(self._outward) as stream:
            if stream is not None and current is not None:
                stream.wait_stream(current)
                for moment in fetched.moments:
                    moment.record_stream(stream)
            for moment, name in zip(fetched.moments, _MOMENTS, strict=True):
                state[name].copy_(moment, non_blocking=True)
            state["stored"] = None if stream is None else stream.record_event()


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[torch.cuda.Stream | None]:
    if stream is None:
        yield None
        return
    with torch.cuda.stream(stream):
        yield stream


def _adamw(parameter: torch.Tensor, state: dict[str, Any], moments: list[torch.Tensor], group: dict[str, Any]) -> None:
    assert parameter.grad is not None
    first, second = group["betas"]
    adamw(
        [parameter], [parameter.grad], moments[:1], moments[1:], [], [state["step"]], fused=True, amsgrad=False,
        beta1=first, beta2=second, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip


def _host_zeros(elements: int, device: torch.device) -> torch.Tensor:
    """fp32 zeros in main memory, pinned as they are: what torch pins itself it rounds up to a power of two."""
    zeros = torch.zeros(elements, dtype=torch.float32)
    if device.type == "cuda":
        status = torch.cuda.cudart().cudaHostRegister(zeros.data_ptr(), zeros.nbytes, 0)
        if int(status) != 0:
            raise RuntimeError(f"cudaHostRegister of {zeros.nbytes >> 20} MiB gave {status}")
    return zeros
