import pytest
import torch

from tokenzoo.encoders.discriminators import Discriminators, PeriodDiscriminator, SpectrumDiscriminator


def test_a_period_is_never_mixed_with_another():
    torch.manual_seed(0)
    part = PeriodDiscriminator(5, 4)
    x = torch.randn(1, 1, 1000)
    changed = x.clone()
    changed[..., 2::5] += 1
    logits, others = part(x)[-1], part(changed)[-1]
    assert torch.equal(logits[..., [0, 1, 3, 4]], others[..., [0, 1, 3, 4]])
    assert not torch.equal(logits[..., 2], others[..., 2])


def test_a_spectrum_sees_phases_and_has_gradients_in_silence():
    torch.manual_seed(0)
    part = SpectrumDiscriminator(64, 4)
    time = torch.arange(800) / 800
    one, other = (torch.sin(2 * torch.pi * 100 * time + shift)[None, None] for shift in (0, 1.5))
    assert not torch.allclose(part(one)[-1], part(other)[-1], atol=1e-4)
    silence = torch.zeros(1, 1, 800, requires_grad=True)
    part(silence)[-1].sum().backward()
    assert silence.grad.isfinite().all()


def test_all_parts_answer_with_activations_and_logits():
    found = Discriminators((2, 3), (64, 128), 4)(torch.randn(2, 1, 700))
    assert len(found) == 4
    assert all(len(activations) == 5 and activations[-1].shape[:2] == (2, 1) for activations in found)
    with pytest.raises(ValueError, match="at least one"):
        Discriminators((), (), 4)


def test_they_learn_to_tell_tones_from_noise():
    torch.manual_seed(0)
    model = Discriminators((2, 3), (64,), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in range(30):
        tones = torch.sin(torch.arange(600) * torch.rand(4, 1, 1))
        logits = [activations[-1] for activations in model(torch.cat([tones, torch.randn(4, 1, 600)]))]
        loss = sum(torch.relu(1 - x[:4]).mean() + torch.relu(1 + x[4:]).mean() for x in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.7 * history[0]
