"""The first thing a newcomer runs: bundled photos through bundled weights, with no network."""

from tokenzoo.demo.sheet import run

__all__ = ["run"]
