"""From a published checkpoint on disk to a folder that loads with no network."""

import functools
import os
from pathlib import Path

from tokenzoo.hub import assemble, find_adapter, read_published, verify
from tokenzoo.partial import read_tensors
from tokenzoo.published import with_published_config
from tokenzoo.registry import find_card, tokenizer_class
from tokenzoo.tokenizers.errors import ConfigError, WeightsError


def convert(source_file: str | os.PathLike[str], name: str, folder: str | os.PathLike[str]) -> Path:
    """Turns published weights that you have on disk into a folder that `tokenzoo.load` reads.

    For machines without a network, and for weights that only a browser can fetch: get the file that the card names with any
    tool (`info(name).source` gives repository, revision and file, or an address), carry it over, and convert it once. Where
    that source names a `config`, put that file beside it.

        >>> tokenzoo.convert("pytorch_model.bin", "one_d_piece_s.in1k_256", "one_d_piece_s")
        >>> tok = tokenzoo.load("./one_d_piece_s")

    Args:
        source_file: The published file: safetensors (by its suffix) or a PyTorch pickle, of which only tensors are read; or the
            index of several safetensors files, which lie beside it.
        name: Card whose weights they are; its tag may be left out as in `load`.
        folder: Made if missing.

    Returns:
        The folder, with `config.json`, `model.safetensors` and the card.

    Raises:
        ConfigError: If the card's config is not one that the architecture takes.
        UnknownTokenizerError: If no card has this name.
        WeightsError: If the file is missing or damaged, is not the one that the card's sha256 names, does not fit, or would
            execute code when read; nothing is executed, and nothing is written.
    """
    card = find_card(name)
    cls = tokenizer_class(card.architecture)
    path = Path(source_file).expanduser()
    if not path.is_file():
        raise WeightsError(f"there is no file {path}: expected the {card.source.file} that {card.name} is made from")
    verify(path, card.source.sha256)
    card = with_published_config(card, cls, functools.partial(_beside, path, str(card.source.repo)))
    revision = card.source.revision if card.source.sha256 else None
    adapter = find_adapter(card, cls)
    if card.source.tensors is not None:
        state = adapter.to_ours(read_tensors(path, card.source.tensors))
    else:
        state = read_published(path, adapter)
    tokenizer = assemble(card, cls, state, revision)
    return tokenizer.save_pretrained(Path(folder).expanduser())


def _beside(weights: Path, own_repo: str, repo: str, file: str) -> Path:
    """A published config that the user put beside the weights: its own under its name, another repository's under that."""
    path = weights.with_name(Path(file).name if repo == own_repo else f"{repo.replace('/', '--')}.{file}")
    if not path.is_file():
        raise ConfigError(f"there is no file {path}: get {file} of the repository {repo} too, and save it there")
    return path
