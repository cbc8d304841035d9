"""Published state dicts of audio codecs: weight normalisation is folded away when they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from tokenzoo.tokenizers.adapter import Adapter, State
from tokenzoo.tokenizers.errors import WeightsError

OLD_SPELLING = (".weight_g", ".weight_v")
NEW_SPELLING = (".parametrizations.weight.original0", ".parametrizations.weight.original1")


@dataclass(frozen=True)
class FoldingAdapter(Adapter):
    """An `Adapter` for checkpoints whose convolutions are stored as a gain and a direction.

    Both spellings that PyTorch has had are read. Rules see the folded `weight`.

    Attributes:
        spelling: Suffixes of gain and direction that `to_published` writes; none for layouts with folded weights.
        normalized: Prefix of the published names of weight-normalised layers.
        matrices: Endings of our names of matrices that are published as convolutions of kernel size 1.
    """

    spelling: tuple[str, str] | None = None
    normalized: str = ""
    matrices: tuple[str, ...] = ()

    def to_ours(self, published: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_ours`.

        Raises:
            WeightsError: If a gain has no direction, or two published keys become one.
        """
        kept = {key: value for key, value in published.items() if not any(fnmatchcase(key, p) for p in self.dropped)}
        ours = super().to_ours(fold_weight_norm(kept))
        return {name: tensor.flatten(1) if name.endswith(self.matrices) else tensor for name, tensor in ours.items()}

    def to_published(self, ours: Mapping[str, Tensor]) -> State:
        """As `Adapter.to_published`; every convolution becomes a gain and a direction where the layout has them."""
        shaped = {name: tensor[..., None] if name.endswith(self.matrices) else tensor for name, tensor in ours.items()}
        state = super().to_published(shaped)
        if self.spelling is None:
            return state
        published: State = {}
        for name, tensor in state.items():
            if name.startswith(self.normalized) and name.endswith(".weight") and tensor.dim() == 3:
                stem = name.removesuffix(".weight")
                published[stem + self.spelling[0]] = tensor.flatten(1).norm(dim=1)[:, None, None]
                published[stem + self.spelling[1]] = tensor
            else:
                published[name] = tensor
        return published


def fold_weight_norm(state: Mapping[str, Tensor]) -> State:
    """The state dict with `weight = gain * direction / |direction|` in place of the two, the norm taken per first index.

    Raises:
        WeightsError: If a gain has no direction or the other way around.
    """
    folded = dict(state)
    for gain, direction in (OLD_SPELLING, NEW_SPELLING):
        stems = {key.removesuffix(suffix) for suffix in (gain, direction) for key in state if key.endswith(suffix)}
        for stem in stems:
            try:
                g, v = folded.pop(stem + gain), folded.pop(stem + direction)
            except KeyError as error:
                raise WeightsError(f"expected both halves of the weight-normalised {stem}.weight, {error} is missing") from None
            folded[f"{stem}.weight"] = torch._weight_norm(v, g, 0)
    return folded


def seanet_rules(published: str, ours: str, *, wrapped: bool, transposed: Sequence[int] = ()) -> tuple[tuple[str, str], ...]:
    """Renames of the layers of one `encoders.seanet` encoder or decoder.

    Args:
        published: Prefix of its layers in the published state dict, with the final dot.
        ours: Prefix of its layers here.
        wrapped: Whether convolutions lie in two wrappers (`conv.conv.`, as Meta and Kyutai publish them) or in one
            (`conv.`, as transformers does).
        transposed: Positions of transposed convolutions, whose wrappers have names of their own.
    """
    rules = [(f"{published}{{}}.lstm.", f"{ours}{{}}.lstm.")]
    stems = [f"{i}." for i in transposed] + ["{}.block.{}.", "{}.shortcut.", "{}."]
    for stem in stems:
        name = "convtr" if stem[0].isdigit() else "conv"
        if wrapped:
            rules.append((f"{published}{stem}{name}.norm.", f"{ours}{stem}norm."))
            rules.append((f"{published}{stem}{name}.{name}.", f"{ours}{stem}"))
        else:
            rules.append((f"{published}{stem}norm.", f"{ours}{stem}norm."))
            rules.append((f"{published}{stem}conv.", f"{ours}{stem}"))
    return tuple(rules)
