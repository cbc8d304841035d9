"""Measuring tokenizers: rate-distortion curves beside image codecs, and what a card says of them."""
