"""How often the examples of each source come per epoch, once a temperature has evened their shares."""

from collections.abc import Sequence


def epoch_shares(sizes: Sequence[int], repeats: Sequence[float], temperature: float) -> list[float]:
    """[sources] The repeat of each source: what `schedule.epoch_of_source` takes in place of the run file's.

    A source of n examples that repeat r times has the weight (n r)^(1 / temperature) in the epoch, and the epoch is as long as
    without a temperature (Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 3.5.2, without their limit
    on sizes). 1 changes nothing, to the last bit; towards infinity every source comes equally often. `sizes` counts the examples
    that are left to train on; an empty source keeps its repeat.
    """
    examples = [size * repeat for size, repeat in zip(sizes, repeats, strict=True)]
    largest = max(examples, default=0.0)
    if temperature == 1 or largest == 0:
        return list(repeats)
    weights = [(count / largest) ** (1 / temperature) if count else 0.0 for count in examples]
    length, total = sum(examples), sum(weights)
    return [
        length * weight / total / size if size else repeat
        for size, repeat, weight in zip(sizes, repeats, weights, strict=True)
    ]
