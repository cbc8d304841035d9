"""The training loop: any `Tokenizer` with an objective, under accelerate, with exact resume.

Batches, random prefix lengths and every other draw are functions of (seed, step, process), so a run that is stopped and
resumed takes the very steps of one that was not.
"""

import json
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import nn

from tokenzoo.tokenizers import Tokenizer
from tokenzoo.tokenizers.errors import ConfigError
from tokenzoo.training.adversary import Adversary
from tokenzoo.training.checkpoint import AveragedWeights, Checkpoint
from tokenzoo.training.recipe import Recipe
from tokenzoo.training.sources import Source, prepare

log = logging.getLogger("tokenzoo.training")

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
RESULT = "averaged"


def run_recipe(recipe: str | Path, *, data: Path | None = None, out: Path | None = None, resume: bool = False) -> Path:
    """Trains by a recipe file or the name of a bundled recipe; `data` and `out` override its folders.

    Returns:
        The folder that `tokenzoo.load` reads the averaged weights from.
    """
    plan = Recipe.read(recipe)
    if data is not None:
        plan = replace(plan, data=replace(plan.data, folder=str(data)))
    if out is not None:
        plan = replace(plan, output=str(out))
    return train(plan, resume=resume)


def train(recipe: Recipe, tokenizer: Tokenizer | None = None, *, resume: bool = False) -> Path:
    """Trains `tokenizer`, by default the one that the recipe names, until `recipe.steps`.

    After SIGINT and SIGTERM the step is finished and the run saved as at its end, then KeyboardInterrupt raised.

    What is frozen in a given `tokenizer` stays so, and `recipe.freeze` freezes more. A run may be resumed by another recipe;
    what differs is written to the log.

    Returns:
        The folder that `tokenzoo.load` reads the averaged weights from.

    Raises:
        ConfigError: If the recipe does not fit the data, or `resume` finds no checkpoint, or would overwrite one without it.
        KeyboardInterrupt: If a signal ended the run.
    """
    output = Path(recipe.output)
    checkpoint = _find_checkpoint(output, resume)
    with PartialState().main_process_first():  # the others find the decoded media ready
        source = prepare(recipe, output)
    torch.manual_seed(recipe.seed)
    if tokenizer is None:
        tokenizer = _tokenizer(recipe)
    if checkpoint is None:
        _initialise(tokenizer, source, recipe)
    run = _Run(recipe, tokenizer, source, checkpoint)
    with _stop_on_signal() as stopping:
        while run.step < recipe.steps and not stopping:
            run.advance()
    run.save()
    folder = run.export()
    if run.step < recipe.steps:
        raise KeyboardInterrupt
    return folder


class _Run:
    """A run in progress: model, optimizer, average and log."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, source: Source, checkpoint: Checkpoint | None) -> None:
        self.recipe, self.source, self.output = recipe, source, Path(recipe.output)
        self.accelerator = Accelerator(mixed_precision=recipe.precision, step_scheduler_with_optimizer=False)
        self.frozen = _freeze(tokenizer, recipe.freeze)
        if recipe.teacher:
            _teach(tokenizer, recipe.teacher, self.accelerator.device)
        if checkpoint is not None:
            tokenizer.load_state_dict(checkpoint.model)
        tokenizer.to(self.accelerator.device)
        self.tokenizer, self.step = tokenizer, checkpoint.step if checkpoint else 0
        self.average = AveragedWeights(tokenizer, recipe.ema_decay)
        self.model, self.optimizer = self.accelerator.prepare(tokenizer, _optimizer(tokenizer, recipe))
        if checkpoint is not None:
            self.optimizer.load_state_dict(checkpoint.optimizer)
            for name, value in checkpoint.averaged.items():
                self.average.values[name].copy_(value)
        self.adversary = (
            Adversary(recipe.adversary, self.accelerator, recipe.seed, modality=tokenizer.modality)
            if recipe.adversary.width
            else None
        )
        if self.adversary is not None and checkpoint is not None and checkpoint.step > recipe.adversary.start:
            self.adversary.load_state_dict(checkpoint.adversary)
        if checkpoint is not None and (changed := _changes(checkpoint.recipe, _values(recipe))):
            log.warning("resumed by another recipe: %s", changed)
            self.log({"step": self.step, "recipe": changed})
        self.started, self.logged = time.monotonic(), self.step
        self.sums: dict[str, float] = {}

    def advance(self) -> None:
        """One optimizer step, and whatever is due after it."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        seed = int(np.random.SeedSequence((self.recipe.seed, self.step, process)).generate_state(1)[0])
        torch.manual_seed(seed)
        batch = self.source.batch(self.step * processes + process, self.recipe.batch_size).to(self.accelerator.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        self.model.train()
        for module in self.frozen:
            module.eval()
        progress = self.step / max(1, self.recipe.steps)
        generator = torch.Generator().manual_seed(seed)
        result = self.model(batch, progress=progress, generator=generator)
        loss, measured = result.loss, {**result.losses, **result.metrics}
        if self.adversary is not None and self.step >= self.recipe.adversary.start:
            measured["discriminator"] = self.adversary.learn(result.reconstruction, batch)
            told = self.adversary.losses(result.reconstruction, batch)
            loss, measured = loss + sum(told.values()), {**measured, **told}
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.tokenizer, self.step)
        self.step += 1
        self._collect({"loss": loss.detach(), "gradient_norm": norm, **measured})
        self._finish_step()

    def _collect(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(torch.as_tensor(value).detach())

    def _finish_step(self) -> None:
        recipe = self.recipe
        if self.step % recipe.log_every == 0:
            steps, seconds = self.step - self.logged, time.monotonic() - self.started
            speed = steps * recipe.batch_size * self.accelerator.num_processes / seconds
            self.log({"step": self.step, "items_per_second": speed, **{k: v / steps for k, v in self.sums.items()}})
            self.started, self.logged, self.sums = time.monotonic(), self.step, {}
        if self.step % recipe.eval_every == 0:
            self.log({"step": self.step, **self.evaluate()})
        if self.step % recipe.save_every == 0:
            self.save()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How well held-out items are reconstructed by the averaged weights."""
        current = {name: tensor.clone() for name, tensor in self.tokenizer.state_dict().items()}
        self.tokenizer.load_state_dict(self.average.state_dict(self.tokenizer))
        measured = self.source.evaluate(self.tokenizer.eval(), self.recipe)
        self.tokenizer.load_state_dict(current)
        return measured

    def log(self, values: dict[str, Any]) -> None:
        """Appends one line to the log."""
        if self.accelerator.is_main_process:
            with (self.output / LOG).open("a") as file:
                file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}) + "\n")

    def save(self) -> None:
        """Replaces the checkpoint."""
        if self.accelerator.is_main_process:
            state = self.tokenizer.state_dict()
            optimizer = self.optimizer.optimizer.state_dict()
            adversary = self.adversary.state_dict() if self.adversary is not None else {}
            found = Checkpoint(self.step, state, optimizer, self.average.values, adversary, _values(self.recipe))
            found.save(self.output / CHECKPOINT)

    def export(self) -> Path:
        """Writes the averaged weights as a folder for `tokenzoo.load`."""
        folder = self.output / RESULT
        if self.accelerator.is_main_process:
            self.tokenizer.load_state_dict(self.average.state_dict(self.tokenizer))
            self.tokenizer.eval().save_pretrained(folder)
        return folder


def _values(recipe: Recipe) -> dict[str, Any]:
    """What a run depends on, by dotted name: all of the recipe but folders."""
    nested = json.loads(json.dumps(asdict(recipe)))
    values = {f"{name}.{key}": v for name, table in nested.items() if isinstance(table, dict) for key, v in table.items()}
    values |= {name: value for name, value in nested.items() if not isinstance(value, dict)}
    return {name: value for name, value in values.items() if name not in ("output", "data.folder")}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The old and the new value of what differs; nothing for checkpoints that say nothing."""
    names = sorted(before.keys() | now.keys()) if before else []
    return {name: [before.get(name), now.get(name)] for name in names if before.get(name) != now.get(name)}


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, linear decay over the last `decay_steps`."""
    warmup = (step + 1) / max(1, recipe.warmup_steps)
    decay = (recipe.steps - step) / max(1, recipe.decay_steps)
    return recipe.learning_rate * min(1.0, warmup, decay if recipe.decay_steps else 1.0)


def _freeze(tokenizer: Tokenizer, globs: tuple[str, ...]) -> list[nn.Module]:
    """Freezes parameters, and finds the modules that have no others: what they learn without a gradient must stay too."""
    frozen = {name for name, _ in tokenizer.named_parameters() if any(fnmatch(name, glob) for glob in globs)}
    for name, parameter in tokenizer.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    modules = []
    for prefix, module in tokenizer.named_modules():
        names = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()}
        if names and names <= frozen:
            modules.append(module)
    return modules


def _optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, betas=recipe.betas)


def _tokenizer(recipe: Recipe) -> Tokenizer:
    from tokenzoo import registry
    from tokenzoo.loading import load

    if recipe.start:
        tokenizer = load(recipe.start)
        # Weights that are trained further are no longer those of the card.
        tokenizer.name, tokenizer.revision, tokenizer.card_text = "", None, ""
        return tokenizer
    cls = registry.tokenizer_class(recipe.architecture)
    tokenizer = cls(cls.config_class.from_dict(recipe.config))  # type: ignore[call-arg]
    if recipe.inherit:
        _inherit(tokenizer, load(recipe.inherit))
    return tokenizer


def _inherit(tokenizer: Tokenizer, source: Tokenizer) -> None:
    """Copies the weights that have the same name and shape in both."""
    mine, theirs = tokenizer.state_dict(), source.state_dict()
    shared = {name: tensor for name, tensor in theirs.items() if name in mine and mine[name].shape == tensor.shape}
    if not shared:
        raise ConfigError(f"{source.name or source.architecture} has no weights in common with {tokenizer.architecture}")
    tokenizer.load_state_dict(shared, strict=False)


def _teach(tokenizer: Tokenizer, teacher: str, device: torch.device) -> None:
    """Hands a tokenizer the one that it learns from."""
    from tokenzoo.loading import load

    learn_from = getattr(tokenizer, "learn_from", None)
    if learn_from is None:
        raise ConfigError(f"recipe: {tokenizer.architecture} learns from no teacher, got teacher = {teacher!r}: leave it out")
    learn_from(load(teacher, device=device))


def _initialise(tokenizer: Tokenizer, source: Source, recipe: Recipe) -> None:
    """Lets a tokenizer that is trained from scratch estimate what it can from data."""
    initialise = getattr(tokenizer, "initialise", None)
    if initialise is not None and recipe.architecture:
        initialise(source.initial(recipe.initialise_items), torch.Generator().manual_seed(recipe.seed))


def _find_checkpoint(output: Path, resume: bool) -> Checkpoint | None:
    path = output / CHECKPOINT
    if resume != path.exists():
        advice = "start without --resume" if resume else "pass --resume to go on, or choose another folder with --out"
        raise ConfigError(f"{path} {'does not exist' if resume else 'exists'}: {advice}")
    output.mkdir(parents=True, exist_ok=True)
    return Checkpoint.load(path) if resume else None


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM instead of the process."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        pass  # only the main thread may set handlers; elsewhere the run goes to its end
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
