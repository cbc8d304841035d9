import copy
import json
import os
import signal
from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch

from tokenzoo import load
from tokenzoo.registry import tokenizer_class
from tokenzoo.tokenizers.errors import ConfigError
from tokenzoo.tokenizers.image.maskgit_vqgan import VQGAN, VQGANConfig
from tokenzoo.tokenizers.learning import Learning
from tokenzoo.tokenizers.quantizers import VectorQuantizer
from tokenzoo.training import Recipe, loop, train
from tokenzoo.training.checkpoint import AveragedWeights


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_stopped_and_resumed_equals_never_stopped(recipe, tmp_path, checkpoint):
    train(recipe)
    whole = checkpoint(recipe)
    parts = replace(recipe, output=str(tmp_path / "parts"))
    train(replace(parts, steps=3))
    train(parts, resume=True)
    resumed = checkpoint(parts)
    assert resumed.step == whole.step == 6
    assert equal(whole.model, resumed.model)
    assert equal(whole.averaged, resumed.averaged)
    moments = [[s["exp_avg_sq"] for s in c.optimizer["state"].values()] for c in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_what_another_recipe_changes_is_logged(recipe, caplog, log):
    train(replace(recipe, steps=2))
    train(replace(recipe, steps=2), resume=True)
    assert "another recipe" not in caplog.text
    train(replace(recipe, steps=3, learning_rate=recipe.learning_rate / 2), resume=True)
    lines = log(recipe)
    changed = next(line["recipe"] for line in lines if "recipe" in line)
    assert changed == {"learning_rate": [recipe.learning_rate, recipe.learning_rate / 2], "steps": [2, 3]}
    assert "another recipe" in caplog.text


def test_a_signal_saves_and_interrupts_the_run(recipe, monkeypatch, checkpoint):
    advance = loop._Run.advance

    def interrupted(run):
        advance(run)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._Run, "advance", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert checkpoint(recipe).step == 2
    assert load(recipe.output + "/averaged").architecture == "one_d_piece_nano"
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_result_loads_and_holds_the_average(recipe, log, checkpoint):
    folder = train(replace(recipe, eval_every=3))
    tokenizer = load(str(folder))
    averaged = checkpoint(recipe).averaged
    assert all(torch.equal(tokenizer.state_dict()[name], value) for name, value in averaged.items())
    lines = log(recipe)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert {"held_out_psnr_2", "held_out_psnr_6"} <= lines[1].keys()
    assert {"loss", "psnr", "items_per_second"} <= lines[0].keys()


def test_frozen_parameters_stay(recipe, checkpoint):
    train(replace(recipe, steps=1, freeze=("code.*",)))
    first = checkpoint(recipe).model
    train(replace(recipe, freeze=("code.*",)), resume=True)
    last = checkpoint(recipe).model
    assert all(torch.equal(first[key], last[key]) for key in first if key.startswith("code."))
    assert not torch.equal(first["refiner.head.weight"], last["refiner.head.weight"])


def test_fine_tuning_starts_from_given_weights(recipe, tmp_path, checkpoint):
    folder = train(recipe)
    tuned = replace(recipe, architecture="", start=str(folder), steps=1, output=str(tmp_path / "tuned"))
    train(replace(tuned, learning_rate=0.0))
    assert equal(load(str(folder)).state_dict(), checkpoint(tuned).model)


def test_the_error_falls(recipe, log):
    train(replace(recipe, steps=60, learning_rate=3e-3, log_every=20, freeze=("code.*",)))
    lines = log(recipe)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(recipe, tmp_path):
    with pytest.raises(ConfigError, match="without --resume"):
        train(recipe, resume=True)
    train(replace(recipe, steps=1))
    with pytest.raises(ConfigError, match="pass --resume"):
        train(recipe)
    with pytest.raises(ConfigError, match="found no photos"):
        train(replace(recipe, output=str(tmp_path / "x"), data=replace(recipe.data, include=("*.bmp",))))
    with pytest.raises(ConfigError, match="pass --data"):
        train(replace(recipe, output=str(tmp_path / "y"), data=replace(recipe.data, folder="")))


def test_learning_rate_warms_up_and_decays():
    recipe = Recipe(start="x", learning_rate=1.0, steps=100, warmup_steps=10, decay_steps=20)
    rates = [loop.learning_rate(recipe, step) for step in (0, 9, 50, 90, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.05])


def test_the_average_forgets_the_start():
    module = torch.nn.Linear(2, 2)
    average = AveragedWeights(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for update in range(200):
        average.update(module, update)
    assert torch.allclose(average.state_dict(module)["weight"], torch.ones(2, 2), atol=1e-4)


def test_a_student_learns_from_a_teacher(recipe, tmp_path):
    pixels = {"image_size": 16, "channels": 32, "multipliers": [1, 1, 1], "blocks": 1, "dim": 4, "codebook_size": 8}
    plan = replace(recipe, steps=1, batch_size=2, eval_lengths=(), save_every=1)
    teacher = train(replace(plan, architecture="maskgit_vqgan", config=pixels, output=str(tmp_path / "teacher")))
    student = {"image_size": 16, "patch_size": 4, "num_tokens": 4, "token_dim": 4, "codebook_size": 16}
    student |= {
        f"{side}_{key}": 16 if key == "dim" else 1 for side in ("encoder", "decoder") for key in ("dim", "layers", "heads")
    }
    student |= {f"pixel_{key}": pixels[key] for key in ("channels", "multipliers", "blocks", "dim", "codebook_size")}
    first = replace(
        plan, architecture="titok", config=student, teacher=str(teacher), output=str(tmp_path / "first"), log_every=1
    )
    folder = train(replace(first, freeze=("decoder.head.codebook", "decoder.head.pixel_decoder.*")))
    line = json.loads((tmp_path / "first" / loop.LOG).read_text().splitlines()[0])
    assert {"proxy", "proxy_accuracy"} <= line.keys()
    theirs = load(str(teacher)).decoder.state_dict()
    assert equal(load(str(folder)).decoder.head.pixel_decoder.state_dict(), theirs)
    with pytest.raises(ConfigError, match="learns from no teacher"):
        train(replace(recipe, teacher=str(teacher), output=str(tmp_path / "other")))


@pytest.mark.parametrize("name", ["maskgit_vqgan_nano", "titok_nano_stage1", "titok_nano_stage2", "retok_nano"])
def test_bundled_recipes_name_what_they_train(name):
    plan = Recipe.read(name)
    if plan.start:
        assert plan.start == Recipe.read("titok_nano_stage1").output + "/averaged"
        return
    cls = tokenizer_class(plan.architecture)
    tok = cls(cls.config_class.from_dict(plan.config))
    assert all(any(fnmatch(key, glob) for key in tok.state_dict()) for glob in plan.freeze)
    if plan.teacher:
        assert plan.teacher == Recipe.read("maskgit_vqgan_nano").output + "/averaged"
        tok.learn_from(VQGAN(VQGANConfig.from_dict(Recipe.read("maskgit_vqgan_nano").config)))


def test_weights_are_inherited_where_name_and_shape_agree(recipe, tmp_path):
    parent = load(str(train(recipe)))
    config = {**recipe.config, "num_tokens": 8, "halting_dim": 8}
    child = replace(
        recipe, architecture="karl_nano", config=config, inherit=str(tmp_path / "run/averaged"), output=str(tmp_path / "child")
    )
    grown = load(str(train(replace(child, steps=1, learning_rate=0.0, eval_lengths=()))))
    for name, tensor in parent.state_dict().items():
        if name.startswith(("refiner.", "length_embedding.")):
            assert torch.equal(grown.state_dict()[name], tensor)
    assert grown.code.scales.shape == (4, 8, 4)
    assert not torch.equal(grown.code.codebook, torch.zeros_like(grown.code.codebook))


def test_nothing_to_inherit_is_refused(recipe, tmp_path):
    VQGAN(VQGANConfig.from_dict(Recipe.read("maskgit_vqgan_nano").config)).eval().save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="no weights in common"):
        train(replace(recipe, inherit=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="only beside architecture"):
        replace(recipe, architecture="", start="x", inherit="y")


@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_frozen_codebook_stays_and_so_do_the_ids(recipe, decay):
    titok = tokenizer_class("titok")
    sizes = {
        f"{side}_{key}": 16 if key == "dim" else 1 for side in ("encoder", "decoder") for key in ("dim", "layers", "heads")
    }
    config = {"image_size": 16, "patch_size": 4, "num_tokens": 4, "token_dim": 4, "codebook_size": 64, **sizes}
    torch.manual_seed(0)
    tok = titok(titok.config_class.from_dict({**config, "legacy": False}))
    options = {"kmeans_iterations": 2, "restart_after": 1, "decay": decay}
    tok.quantizer = VectorQuantizer(64, 4, metric="cosine", learning=Learning(**options))
    images = torch.rand(3, 3, 16, 16)
    before, ids = copy.deepcopy(tok.state_dict()), tok.eval().encode(images).ids
    train(replace(recipe, freeze=("encoder.*", "quantizer.*"), steps=4, eval_lengths=()), tok)
    after = tok.state_dict()
    kept = [key for key in before if key.startswith(("encoder.", "quantizer."))]
    assert {"quantizer.learner.idle_steps", "quantizer.learner.started"} <= set(kept)
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert not torch.equal(before["decoder.head.conv_out.weight"], after["decoder.head.conv_out.weight"])
    assert torch.equal(tok.encode(images).ids, ids)


def test_a_codebook_of_averages_is_not_trained_by_gradients(recipe):
    tok = tokenizer_class("one_d_piece_nano")(tokenizer_class("one_d_piece_nano").config_class.from_dict(recipe.config))
    tok.averaged = VectorQuantizer(8, 4, learning=Learning(decay=0.9))
    assert loop._freeze(tok, ("code.*",))[0] is tok.code
    assert not tok.averaged.codebook.requires_grad
    assert tok.refiner.head.weight.requires_grad
