import pytest
import torch
from accelerate import Accelerator

from tokenzoo.encoders.clip_discriminators import ClipDiscriminator, ClipDiscriminators, FrameDiscriminator
from tokenzoo.tokenizers.video.vidtok import VidTok, VidTokConfig
from tokenzoo.training.adversary import Adversary
from tokenzoo.training.recipe import AdversaryRecipe


def test_frames_are_judged_one_by_one_and_clips_together():
    torch.manual_seed(0)
    clip = torch.rand(1, 5, 3, 16, 16)
    shuffled = clip[:, [4, 0, 3, 1, 2]]
    frames, together = FrameDiscriminator(4), ClipDiscriminator(4)
    assert torch.allclose(frames(clip)[-1][[4, 0, 3, 1, 2]], frames(shuffled)[-1], atol=1e-6)
    assert not torch.allclose(together(clip)[-1].mean(), together(shuffled)[-1].mean(), atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_both_answer_with_activations_and_logits(frames):
    found = ClipDiscriminators(4)(torch.rand(2, frames, 3, 8, 16))
    assert [len(activations) for activations in found] == [4, 4]
    assert found[0][-1].shape == (2 * frames, 1, 1, 2)
    assert found[1][-1].shape == (2, 1, (frames + 1) // 2, 1, 2)


def test_an_adversary_of_clips_learns_and_teaches():
    torch.manual_seed(0)
    adversary = Adversary(AdversaryRecipe(width=8, learning_rate=3e-3), Accelerator(cpu=True), 0, modality="video")
    still = torch.rand(4, 1, 3, 16, 16).expand(-1, 5, -1, -1, -1)
    flicker = torch.rand(4, 5, 3, 16, 16)
    history = [float(adversary.learn(flicker, still)) for _ in range(25)]
    assert history[-1] < 0.7 * history[0]

    tok = VidTok(VidTokConfig(channels=4, multipliers=(1, 2, 2, 2)))
    found = tok(still)
    told = adversary.losses(found.reconstruction, still)
    (found.loss + sum(told.values())).backward()
    assert all(parameter.grad is not None for parameter in tok.parameters())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in adversary.module.parameters())
