"""From a config and a state dict to a tokenizer: built without random weights, filled strictly, put on its device."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenzoo.tokenizers.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from tokenzoo.tokenizers.tokenizer import Tokenizer

_KEYS_SHOWN = 3

T = TypeVar("T", bound="Tokenizer")


def build(cls: type[T], config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> T:
    """A tokenizer in eval mode with these weights, loaded strictly. The global random state is left as it was.

    Args:
        cls: The architecture's class.
        config: Values of its config.
        state: Its weights in our own layout, in any floating-point precision.
        where: The weights' origin, for messages.

    Raises:
        ConfigError: If the config has unknown keys or wrong values.
        WeightsError: If keys are missing or left over, or shapes differ.
    """
    values = cls.config_class.from_dict(config)
    with torch.random.fork_rng(devices=[]), _NoRandomInit():
        tokenizer = cls(values)  # type: ignore[call-arg]  # a system's constructor takes its config alone
    _check_fit(tokenizer, state, where)
    tokenizer.load_state_dict(state)
    tokenizer.eval()
    _ = tokenizer.digest  # of the weights as stored, and kept through every later cast
    return tokenizer


def place(tokenizer: T, device: torch.device, dtype: torch.dtype | None) -> T:
    """The tokenizer on its device, in the precision asked for. Raises `ConfigError` where there is no such device."""
    try:
        return tokenizer.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error


def parse_device(device: str | torch.device) -> torch.device:
    """A device from itself or its name.

    Raises:
        ConfigError: If torch knows no such device.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"expected device= such as 'cpu', 'cuda' or 'cuda:1', got {device!r}") from error


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype from itself or its name.

    Raises:
        ConfigError: If it is neither.
    """
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed is not None and isinstance(parsed, torch.dtype) and parsed.is_floating_point:
        return parsed
    if dtype is None:
        return None
    raise ConfigError(f"expected dtype= a floating-point dtype or its name, such as 'bfloat16', got {dtype!r}")


def _check_fit(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in ours.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    wrong = {
        "missing": [name for name in ours if name not in state],
        "unexpected": [name for name in state if name not in ours],
        "misshapen": shapes,
    }
    if any(wrong.values()):
        parts = [f"{len(keys)} {kind} ({_few(keys)})" for kind, keys in wrong.items() if keys]
        raise WeightsError(f"the weights of {where} do not fit {type(module).__name__}: {'; '.join(parts)}")


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:_KEYS_SHOWN]) + (", ..." if len(keys) > _KEYS_SHOWN else "")


_SKIPPED = frozenset((nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_))


class _NoRandomInit(TorchFunctionMode):
    """Leaves out what linear, convolution and embedding layers do first: random weights that are about to be overwritten.

    `trunc_normal_` is not left out: it samples until everything is in range, and would not end.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in _SKIPPED and "tensor" in kwargs else func(*args, **kwargs)
