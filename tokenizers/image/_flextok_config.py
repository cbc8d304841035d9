"""Reads a published FlexTok config: a graph of classes and their arguments, made to be instantiated by hydra.

Here it is only read. Every node has to be the class that FlexTok has in that place, by its full name; numbers are taken out
of the arguments that our config has, all other arguments have to be what our network does, and anything unknown is refused.
Names under which modules pass tensors to each other are labels and are skipped.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tokenzoo.encoders.autoencoder_kl import arguments_from_diffusers
from tokenzoo.tokenizers import ConfigError

_PACKAGE = "flextok."
_LABELS = ("_read_key", "_write_key", "_read_write_key", "_read_keys", "_write_keys")

_MODEL = "model."
_ENCODER = {
    "enc_channels_to_last": _MODEL + "utils.dict_ops.PerSampleOp",
    "enc_patch_emb": _MODEL + "preprocessors.patching.PatchEmbedder",
    "enc_posemb_module": _MODEL + "utils.posembs.PositionalEmbeddingAdder",
    "enc_register_module": _MODEL + "preprocessors.registers.Registers1D",
    "enc_seq_packer": _MODEL + "preprocessors.flex_seq_packing.BlockWiseSequencePacker",
    "enc_transformer": _MODEL + "trunks.transformers.FlexTransformer",
    "enc_unpacker": _MODEL + "postprocessors.seq_unpacking.SequenceUnpacker",
    "enc_to_latents": _MODEL + "postprocessors.heads.LinearHead",
}
_DECODER = {
    "dec_from_latents": _MODEL + "preprocessors.linear.LinearLayer",
    "dec_registers_posemb_module": _MODEL + "utils.posembs.PositionalEmbeddingAdder",
    "dec_nested_dropout": _MODEL + "preprocessors.token_dropout.MaskedNestedDropout",
    "dec_latent_dropout": _MODEL + "preprocessors.nullcond.LearnedNullCond",
    "dec_noise_channels_to_last": _MODEL + "utils.dict_ops.PerSampleOp",
    "dec_noise_patch_emb": _MODEL + "preprocessors.patching.PatchEmbedder",
    "dec_patches_posemb_module": _MODEL + "utils.posembs.PositionalEmbeddingAdder",
    "dec_seq_packer": _MODEL + "preprocessors.flex_seq_packing.BlockWiseSequencePacker",
    "dec_time_embedder": _MODEL + "preprocessors.time_embedding.TimestepEmbedder",
    "dec_transformer": _MODEL + "trunks.transformers.FlexTransformer",
    "dec_unpacker": _MODEL + "postprocessors.seq_unpacking.SequenceUnpacker",
    "dec_to_patches": _MODEL + "postprocessors.heads.ToPatchesLinearHead",
    "dec_channels_to_first": _MODEL + "utils.dict_ops.PerSampleOp",
}
# What only training or another way of computing the same uses.
_SKIPPED = {
    *("weight_init_style", "zero_init_query_proj", "use_act_checkpoint", "drop", "drop_path_rate", "intermediate_layers"),
    *("compile_block_mask", "return_materialized_mask", "pad_to_multiple", "max_seq_len", "flatten_patches", "packed_call"),
    *("drop_quant_p", "corrupt_tokens_p", "min_corrupt_tokens_p", "apply_corrupt_tokens_p", "dtype_override"),
    *("learnable_logvar", "logvar_init", "compile_encode_fn", "force_vae_encode", "frozen", "sample_posterior"),
    *("size_sampling_mode", "n_min", "n_eval", "_partial_", "stratisfied"),
}
_STANDARD_VAE = {"channels": (128, 256, 512, 512), "num_blocks": 2, "groups": 32}


def config_from_published(
    published: Mapping[str, Any], related: Callable[[str], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The values of our config that the `config.json` of a published repository stands for.

    Of the autoencoder's posterior the mean is taken, whatever `sample_posterior` says there, so that ids do not vary.

    Args:
        published: The graph, with the parts `vae`, `encoder`, `regularizer`, `decoder`, `flow_matching_noise_module` and
            `pipeline`. Arguments that it leaves out have the values that the reference implementation gives them.
        related: Gives the `config.json` of another repository, `org/name`; needed where the autoencoder refers to one.

    Raises:
        ConfigError: If a part is missing, or is not FlexTok's; says which.
    """
    try:
        return _read(_Node(published, "config"), related)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # values of another type or length than theirs
        raise ConfigError(f"published config of a FlexTok: {error}") from error


class _Node:
    """Takes arguments out of a node of the graph, and then knows what nobody asked for."""

    def __init__(self, values: Any, where: str, target: str | None = None) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"expected {where} to be an object, got {values!r}")
        self.values, self.where = dict(values), where
        found = self.values.pop("_target_", None)
        if target is not None and found != _PACKAGE + target:
            raise ValueError(f"expected {where} to be {_PACKAGE + target}, got {found!r}; nothing was imported")

    def take(self, key: str, default: Any = None) -> Any:
        """An argument, once; without a default it must be there."""
        value = self.values.pop(key, default)
        if value is None:
            raise ValueError(f"{self.where} lacks {key!r}")
        return value

    def expect(self, **expected: Any) -> None:
        """Arguments that are to be left out, or to be these."""
        for key, value in expected.items():
            if (found := self.values.pop(key, value)) != value:
                raise ValueError(f"expected {self.where}.{key} = {value!r}, got {found!r}: this network has another graph")

    def part(self, key: str, target: str | None) -> "_Node":
        """A node below this one."""
        return _Node(self.take(key), f"{self.where}.{key}", target)

    def close(self) -> None:
        """Refuses what is left."""
        left = [key for key in self.values if key not in _SKIPPED and not f"_{key}".endswith(_LABELS)]
        if left:
            raise ValueError(f"{self.where} has unknown arguments: {', '.join(sorted(map(str, left)))}")


def _read(root: _Node, related: Callable[[str], Mapping[str, Any]] | None) -> dict[str, Any]:
    config = _read_vae(root.part("vae", "vae_wrapper.StableDiffusionVAE"), related)
    regularizer = root.part("regularizer", "regularizers.quantize_fsq.FSQ")
    config["levels"] = tuple(regularizer.take("levels"))
    regularizer.close()
    config |= _read_encoder(_modules(root, "encoder", _ENCODER), config)
    config |= _read_decoder(_modules(root, "decoder", _DECODER), config)
    config |= _read_flow(root, config)
    root.close()
    return config


def _read_vae(vae: _Node, related: Callable[[str], Mapping[str, Any]] | None) -> dict[str, Any]:
    channels, factor = vae.values.pop("latent_channels", 16), vae.values.pop("scaling_factor", None)
    elsewhere = vae.values.pop("hf_hub_path", None)
    vae.close()
    arguments = {"latent_channels": channels, **_STANDARD_VAE}
    if elsewhere is not None:
        if related is None:
            raise ValueError(f"the autoencoder is described by {elsewhere}: its config.json is needed too")
        arguments = arguments_from_diffusers(related(str(elsewhere)))
        factor = factor or arguments.pop("scaling_factor", None) or 0.18215  # diffusers' default
    if factor is None:
        raise ValueError("vae has neither a scaling_factor nor a hf_hub_path")
    return {
        "vae_channels": tuple(arguments["channels"]),
        "vae_blocks": arguments["num_blocks"],
        "vae_groups": arguments["groups"],
        "latent_channels": arguments["latent_channels"],
        "scaling_factor": float(factor),
    }


def _modules(root: _Node, side: str, expected: Mapping[str, str]) -> dict[str, _Node]:
    """The modules of one side, which must be these in this order; what training compared features with is left out."""
    wrapper = root.part(side, _MODEL + "utils.wrappers.SequentialModuleDictWrapper")
    nodes = wrapper.part("module_dict", None)
    wrapper.close()
    names = [name for name in nodes.values if not name.startswith("dec_repa")]
    if names != list(expected):
        raise ValueError(f"expected the modules of the {side} to be {', '.join(expected)}, got {', '.join(map(str, names))}")
    return {name: nodes.part(name, target) for name, target in expected.items()}


def _read_encoder(nodes: Mapping[str, _Node], config: Mapping[str, Any]) -> dict[str, Any]:
    dim = _dim(nodes["enc_patch_emb"])
    registers = nodes["enc_register_module"]
    registers.expect(dim=dim, ordering_mode="nested", extra_registers_dim=None)
    values = {
        "encoder_dim": dim,
        "num_tokens": registers.take("n_max"),
        "patch_size": _patch_size(nodes["enc_patch_emb"], config),
        **_positions(nodes["enc_posemb_module"], "encoder", dim),
        **_transformer(nodes["enc_transformer"], "encoder", dim),
    }
    nodes["enc_seq_packer"].expect(mask_mode="causal_last", per_subseq_embs=False)
    nodes["enc_to_latents"].expect(dim=dim, dim_out=len(config["levels"]), use_mup_readout=False, proj_bias=True)
    _layout(nodes["enc_channels_to_last"], "channels_first_to_last")
    _close(nodes)
    return values


def _read_decoder(nodes: Mapping[str, _Node], config: Mapping[str, Any]) -> dict[str, Any]:
    dim = _dim(nodes["dec_noise_patch_emb"])
    if _patch_size(nodes["dec_noise_patch_emb"], config) != config["patch_size"]:
        raise ValueError("expected encoder and decoder to have patches of one size")
    nodes["dec_from_latents"].expect(dim=dim, dim_in=len(config["levels"]), proj_bias=True)
    registers = nodes["dec_registers_posemb_module"]
    registers.expect(dim=dim, posemb_scaling="absolute")
    if registers.take("posemb_type", "sincos") not in ("learnable_sum", "learnable_prod"):
        raise ValueError(f"expected {registers.where}.posemb_type to be learned")
    dropout, null, time = (nodes[f"dec_{name}"] for name in ("nested_dropout", "latent_dropout", "time_embedder"))
    for node in (dropout, null, time):
        node.expect(dim=dim)
    null.expect(replace_with_single_token=False)
    time.expect(temb_as_tokens=False)
    transformer, head = nodes["dec_transformer"], nodes["dec_to_patches"]
    transformer.expect(adaLN_expansion=2)
    nodes["dec_seq_packer"].expect(mask_mode="full", per_subseq_embs=True)
    size, channels = config["patch_size"], config["latent_channels"]
    head.expect(
        dim=dim, channels_out=channels, patch_sizes=[size, size], use_mup_readout=False, proj_bias=True, adaLN_bias=True
    )
    values = {
        "decoder_dim": dim,
        "register_table": registers.take("max_sizes")[0],
        "prefix_sampling": dropout.values.get("size_sampling_mode", "uniform"),
        "null_probability": float(null.take("dropout_prob", 0.0)),
        "time_frequencies": time.take("frequency_embedding_size", 256),
        "max_time": float(time.take("max_timestep", 1000.0)),
        **_positions(nodes["dec_patches_posemb_module"], "decoder", dim),
        **_transformer(transformer, "decoder", dim),
    }
    if values["head_dim"] != config["head_dim"] or values["mlp_ratio"] != config["mlp_ratio"]:
        raise ValueError("expected encoder and decoder to have one head_dim and one mlp_ratio")
    _layout(nodes["dec_noise_channels_to_last"], "channels_first_to_last")
    _layout(nodes["dec_channels_to_first"], "channels_last_to_first")
    _close(nodes)
    return values


def _read_flow(root: _Node, config: Mapping[str, Any]) -> dict[str, Any]:
    noise = root.part("flow_matching_noise_module", "flow_matching.noise_modules.MinRFNoiseModule")
    normal = noise.take("ln", True)
    values = {"time_sampling": "logit_normal" if normal else "mode", "mode_scale": float(noise.take("mode_scale", 0.0))}
    noise.close()
    pipeline = root.part("pipeline", "flow_matching.pipelines.MinRFPipeline")
    pipeline.expect(out_channels=config["latent_channels"])
    pipeline.close()
    return values


def _dim(node: _Node) -> int:
    dim = node.values.get("dim")
    if not isinstance(dim, int):
        raise ValueError(f"expected {node.where}.dim to be a whole number, got {dim!r}")
    return dim


def _patch_size(node: _Node, config: Mapping[str, Any]) -> int:
    node.expect(channels_in=config["latent_channels"])
    node.take("dim")
    sizes = node.take("patch_sizes")
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise ValueError(f"expected {node.where}.patch_sizes to be two equal sizes, got {sizes}")
    return int(sizes[0])


def _positions(node: _Node, side: str, dim: int) -> dict[str, Any]:
    node.expect(dim=dim, posemb_scaling="absolute")
    return {f"{side}_positions": node.take("posemb_type", "sincos"), f"{side}_table": tuple(node.take("max_sizes"))}


def _transformer(node: _Node, side: str, dim: int) -> dict[str, Any]:
    node.expect(dim=dim, qkv_bias=False, proj_bias=False, mlp_bias=False, gated_mlp=True, qk_norm=True)
    node.expect(rope_forward_read_key=None, score_mod_read_key=None)
    return {
        f"{side}_layers": node.take("depth", 12),
        "head_dim": node.take("head_dim", 64),
        "mlp_ratio": float(node.take("mlp_ratio", 4.0)),
    }


def _layout(node: _Node, name: str) -> None:
    operation = node.part("per_sample_op", f"model.utils.dict_ops.{name}")
    operation.close()


def _close(nodes: Mapping[str, _Node]) -> None:
    for node in nodes.values():
        node.close()
