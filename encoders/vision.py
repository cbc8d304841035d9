"""Patch features of a frozen vision network from timm, such as DINOv2 (https://arxiv.org/abs/2304.07193), to train against."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def vision_tower(
    name: str, size: int, layers: int = 0, *, activation: str | None = None, pretrained: bool = False
) -> nn.Module:
    """A vision transformer of timm's, whose `forward_features` takes images of `size` pixels.

    Args:
        name: timm's.
        size: Height and width in pixels.
        layers: Blocks to keep, without the norm that follows the last one; 0 for the whole network.
        activation: Of the MLPs, by timm's name, such as `gelu_tanh`; by default what timm gives this network.
        pretrained: Get timm's weights from the Hub.

    Raises:
        ValueError: If timm has no vision transformer of this name, or it has fewer blocks.
        OSError: If its weights could not be had from the Hub or from the local cache.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(f"expected a network of timm's, such as vit_so400m_patch14_siglip_384, got {name!r}")
    wanted = f"expected a vision transformer of at least {layers} blocks, got {name!r}"
    options: dict[str, Any] = {} if activation is None else {"act_layer": activation}
    try:
        tower = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size, global_pool="", **options)
    except TypeError as error:
        raise ValueError(wanted) from error
    except OSError as error:
        raise OSError(f"{name} could not be had from the Hub, nor is it in the local cache: {error}") from error
    blocks = getattr(tower, "blocks", None)
    if not isinstance(blocks, nn.Sequential) or not hasattr(tower, "patch_embed") or layers > len(blocks):
        raise ValueError(wanted)
    if layers:
        tower.blocks, tower.norm = blocks[:layers], nn.Identity()
    return tower


class VisionFeatures:
    """What a vision transformer sees in each cell of a grid. Not a module, so that no tokenizer saves its weights.

    Args:
        network: A vision transformer of timm's. It is frozen here.
        grid: Cells along one side of the features; images are resized to this many patches.
    """

    def __init__(self, network: nn.Module, grid: int) -> None:
        self.network = network.eval().requires_grad_(False)
        self.size = grid * int(network.patch_embed.patch_size[0])  # type: ignore[union-attr, index]
        pretrained = network.pretrained_cfg
        self.mean, self.deviation = (torch.tensor(pretrained[key])[:, None, None] for key in ("mean", "std"))  # type: ignore[index]

    @classmethod
    def load(cls, name: str, grid: int, *, pretrained: bool = True) -> "VisionFeatures":
        """A network of timm's by its name, such as `vit_large_patch14_dinov2`, with weights from the Hub.

        Raises:
            ValueError: If timm has no network of this name, or it is none that turns patches into tokens.
            OSError: If its weights could not be had from the Hub or from the local cache.
        """
        import timm

        if not timm.is_model(name):
            raise ValueError(f"expected a network of timm's, such as vit_large_patch14_dinov2, got {name!r}")
        transformers = f"expected a vision transformer with patch tokens, such as vit_large_patch14_dinov2, got {name!r}"
        try:
            network = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError as error:
            raise ValueError(transformers) from error
        except OSError as error:
            raise OSError(f"{name} could not be had from the Hub, nor is it in the local cache: {error}") from error
        if not (hasattr(network, "patch_embed") and hasattr(network, "num_prefix_tokens")):
            raise ValueError(transformers)
        return cls(network, grid)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features `[B, grid * grid, D]`, rows first, of images `[B, 3, H, W]` in [0, 1]."""
        self.network.to(images.device, images.dtype)
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        images = (images - self.mean.to(images)) / self.deviation.to(images)
        features: Tensor = self.network.forward_features(images)  # type: ignore[operator]
        return features[:, self.network.num_prefix_tokens :]
