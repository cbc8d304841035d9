"""Between a published state dict and ours: renamed keys, dropped keys with the reason, both ways, nothing silent."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from tokenzoo.tokenizers.errors import WeightsError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """Renames keys by the first rule whose published side they start with; keys that no rule knows keep their name.

    Attributes:
        rules: Pairs of key prefixes (published, ours); `{}` stands for one number, the same on both sides:
            `("encoder.transformer.{}.ln_1.", "encoder.blocks.{}.norm1.")`.
        dropped: Patterns (`fnmatch`) of published keys that inference does not need, and why.
        pointwise: Our names of weights published as 1x1 convolutions and held here as matrices.
        inside: Keys under which a training checkpoint keeps the state dict, tried in order; the whole file otherwise.
    """

    rules: tuple[tuple[str, str], ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    pointwise: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    def to_ours(self, published: Mapping[str, Tensor]) -> State:
        """Our state dict, without the keys that are dropped.

        Raises:
            WeightsError: If two published keys become one.
        """
        ours: State = {}
        for key, tensor in published.items():
            if any(fnmatchcase(key, pattern) for pattern in self.dropped):
                continue
            name = _rename(key, self.rules)
            if name in ours:
                raise WeightsError(f"two published keys become {name!r}, one of them {key!r}")
            ours[name] = tensor.flatten(1) if name in self.pointwise else tensor
        return ours

    def to_published(self, ours: Mapping[str, Tensor]) -> State:
        """The inverse of `to_ours`, for writing a checkpoint that the reference implementation reads."""
        inverse = tuple((new, old) for old, new in self.rules)
        shaped = {name: tensor[..., None, None] if name in self.pointwise else tensor for name, tensor in ours.items()}
        return {_rename(name, inverse): tensor for name, tensor in shaped.items()}


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        match = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), key)
        if match:
            return new.format(*match.groups()) + key[match.end() :]
    return key
