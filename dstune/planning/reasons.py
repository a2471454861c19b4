"""Why a plan is what it is, in a sentence for the log and for `dstune plan`."""

from collections.abc import Sequence

from dstune.planning.choose import Candidate, Load, gib, nearest
from dstune.planning.cost import faster
from dstune.planning.hardware import Device
from dstune.planning.shapes import ModelShape

_ALIKE = 0.03


def named(one: Candidate) -> str:
    """A way to run in a few words."""
    again = {False: "", True: ", recomputing activations", "offload": ", recomputing activations from host memory"}
    split = f", each row over {one.sequence_parallel} workers" if one.sequence_parallel > 1 else ""
    return f"{one.preset}, micro-batch {one.micro_batch_size}{again[one.recompute]}{split}"


def why(found: Sequence[Candidate], is_cpu: bool) -> str:
    """Why the first of `found` comes before the next other way; or what stands in the way of all. Where all are of one preset, it was
    named, and nothing is said of others.
    """
    first = found[0]
    if not first.fits:
        close = nearest(found)
        return f"nothing fits; nearest comes {named(close)}: {lacking(close)}"
    others = [one for one in found[1:] if one.fits]
    if not others:
        return f"the only way{'' if _is_open(found) else f' of {first.preset}'} that fits, with {headroom(first)}"
    if is_cpu:
        return _on_cpu(found)
    second = min(others, key=lambda one: one.seconds.step)
    return _against(first, second)


def _on_cpu(found: Sequence[Candidate]) -> str:
    first = found[0]
    larger = [one for one in found if not one.fits and one.preset == first.preset]
    tight = ""
    if first.recompute or any(one.micro_batch_size > first.micro_batch_size and not one.recompute for one in larger):
        tight = "; keeping more does not fit this machine's memory"
    way = "on CPUs the presets take about the same time, and this is what a cluster runs"
    if not _is_open(found):
        way = f"of {first.preset} the largest micro-batch" + ("" if first.recompute else " that keeps its activations")
    return f"{way}; {headroom(first)}{tight}"


def _is_open(found: Sequence[Candidate]) -> bool:
    """Whether there was a choice of presets."""
    return len({one.preset for one in found}) > 1


def _against(first: Candidate, second: Candidate) -> str:
    faster = second.seconds.step / first.seconds.step - 1
    if faster < _ALIKE:
        times = f"{first.seconds.step:.3g} and {second.seconds.step:.3g} s a step"
        return f"as fast as {named(second)} ({times}), with {headroom(first)}"
    part = max(first.seconds.parts, key=lambda name: second.seconds.parts[name] - first.seconds.parts[name])
    here, there = first.seconds.parts[part], second.seconds.parts[part]
    return f"{faster:.0%} faster than {named(second)}, most of it in {part}: {here:.3g} s a step against {there:.3g} s"


def headroom(one: Candidate) -> str:
    """How much of the tightest room is left."""
    tight = max(one.rooms, key=lambda room: room.needed / max(1, room.free))
    return f"{gib(tight.free - tight.needed)} of {tight.name} to spare"


def lacking(one: Candidate) -> str:
    """By how much a way does not fit."""
    if one.unusable:
        return one.unusable
    return "; ".join(
        f"{gib(room.missing)} more of {room.name} than may be filled" for room in one.rooms if room.missing
    )


def reckoned_compiled(shape: ModelShape, load: Load, device: Device) -> str:
    """What the plan takes compiled layers to change."""
    kept, plain = shape.compiled_activations, shape.layer_activations
    memory = f"{kept:,} bytes of activations a token and layer instead of {plain:,}" if 0 < kept < plain else "no less"
    return f"reckoned with {faster(load.compiled, False, device.is_cpu):.2f} of the arithmetic's time, and {memory}"


def reckoned_fp8(load: Load, device: Device) -> str:
    """What the plan takes products in 8 bits to change."""
    if device.is_cpu:
        return "a CPU imitates them, many times slower than the plan says"
    if not load.compiled:
        return "reckoned as no faster, for what they save the rounding takes; model.compile: layers joins it with other work"
    left = faster(True, True, False) / faster(True, False, False)
    return f"reckoned with {left:.2f} of the compiled layers' time"
