"""Sizes of `word_pool`."""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict

from tokenzoo.tokenizers import TokenizerConfig
from tokenzoo.tokenizers.text._words import RAW


@strict
@dataclass(kw_only=True)
class WordPoolConfig(TokenizerConfig):
    """Size of the tokenizer.

    Attributes:
        splitter: Name of the splitter.
        longest: Bytes of the longest word; longer ones are cut.
        joined: Kana or Chinese characters in a row, words by themselves, that become one word.
        num_vectors: Vectors k of a word, at most.
        stages: Stages Q of the residual quantizer of a vector. 0: vectors are not quantized and do not decode, and ids are raw
            bytes; such a tokenizer is for `embed` and `score`.
        codebook_size: Ids of each codebook, of which 257 are raw bytes and nothing.
        starts: How many of them are codes of a word's first vector.
        vector_dim: Width D of a vector.
        byte_dim: Width of a byte in the encoder.
        byte_layers: Layers of its byte transformer.
        byte_heads: Attention heads of those.
        queries: Learned queries that pool a vector.
        hidden_dim: Width of the blocks between bytes and vectors.
        blocks: How many of those there are, on each side.
        said_dim: Width of what the decoder's blocks say of a position.
        past_dim: Width of an earlier byte in the decoder.
        position_dim: Width of a position in the decoder.
        position_blocks: Residual blocks of a position.
        margin: By how much, in nats, each byte must beat all others for a code to count as decodable.
        model_dim: Width of the word-level model.
        model_layers: Its layers; without any there is no such model.
        model_heads: Its attention heads.
        context: Words that it looks back on.
        commitment: Weight of the commitment loss.
        decay: Of the codebooks' moving averages; 0: they follow gradients.
        restart_after: Training steps without a word after which a code is set anew; 0: never.
        kmeans_iterations: Rounds of k-means that set the codebooks when they are first used, if there are no pieces.
        continuous: Share of the training before vectors are quantized.
        batch_words: Words of a training batch that are read and written, chosen at random among those that differ.
        batch_pieces: Pieces, chosen at random, that are read and written besides.
    """

    splitter: str = "unicode_word"
    longest: int = 16
    joined: int = 2
    num_vectors: int = 6
    stages: int = 1
    codebook_size: int = 16384
    starts: int = 8192
    vector_dim: int = 64
    byte_dim: int = 512
    byte_layers: int = 2
    byte_heads: int = 4
    queries: int = 16
    hidden_dim: int = 1024
    blocks: int = 2
    said_dim: int = 64
    past_dim: int = 64
    position_dim: int = 512
    position_blocks: int = 2
    margin: float = 0.05
    model_dim: int = 512
    model_layers: int = 8
    model_heads: int = 8
    context: int = 192
    commitment: float = 0.25
    decay: float = 0.99
    restart_after: int = 20
    kmeans_iterations: int = 4
    continuous: float = 0.01
    batch_words: int = 4096
    batch_pieces: int = 1024

    def validate_sizes(self) -> None:
        """Checks what the graph needs of the sizes."""
        if self.stages and not 0 < self.starts < self.codebook_size - RAW:
            raise ValueError(
                f"expected codes of first and of later vectors: starts in [1, codebook_size - {RAW}), since {RAW} ids are raw "
                f"bytes, got {self.starts} with a codebook_size of {self.codebook_size}"
            )
        if not self.stages and self.codebook_size != RAW:
            raise ValueError(f"expected a codebook_size of {RAW} with stages = 0: raw bytes only, got {self.codebook_size}")
        if not 4 <= self.longest <= 256:
            raise ValueError(f"expected longest from 4 to 256 bytes, got {self.longest}")
        if self.byte_dim % self.byte_heads or self.byte_dim % self.queries:
            raise ValueError(f"expected byte_dim to be a multiple of byte_heads and of queries, got {self.byte_dim = }")
        if min(self.num_vectors, self.queries, self.position_dim) < 1 or self.stages < 0 or self.margin <= 0:
            raise ValueError("expected at least one vector, query and channel, no negative stages, and a margin above 0")
