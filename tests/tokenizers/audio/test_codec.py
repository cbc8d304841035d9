"""What holds for every codec."""

import dataclasses
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenzoo.encoders.streaming import Chain
from tokenzoo.tokenizers import MediaError, Tokens, TokensError, WrongTokenizerError


def noise(codec, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.4 * torch.randn(codec.channels, samples, generator=generator).clamp(-2, 2)


def equal(tokens, other):
    """Whether two items are the same; `tokens` may come from a batch, whose extras are padded."""
    extras = {name: extra[:, : other.extras[name].shape[1]] for name, extra in tokens.extras.items()}
    return dataclasses.replace(tokens, extras=extras).equal(other)


def test_random_ragged_batches_give_each_item_its_own_ids_and_samples(codec):
    """With eight codecs, 1,144 batches."""
    generator = torch.Generator().manual_seed(0)
    alone = {}
    for _ in range(125):
        size = int(torch.randint(2, 4, (), generator=generator))
        lengths = torch.randint(1, 100, (size,), generator=generator).tolist()
        tokens = codec.encode([noise(codec, n, n) for n in lengths])
        for n in set(lengths) - alone.keys():
            alone[n] = codec.encode(noise(codec, n, n))
        assert all(equal(item, alone[n]) for item, n in zip(tokens, lengths, strict=True))
        assert [audio.shape for audio in codec.decode(tokens)] == [(codec.channels, n) for n in lengths]


def test_true_batches_equal_singles(codec):
    batch = torch.stack([noise(codec, 230, seed) for seed in range(3)])
    together = codec._encode(batch, length=None, seed=0)
    for i in range(3):
        assert torch.equal(codec._encode(batch[i : i + 1], length=None, seed=0).ids[0], together.ids[i])
    lengths = (
        together.ids.new_full(together.ids.shape[:2], together.ids.shape[2]) if together.lengths is None else together.lengths
    )
    audio = codec._decode(together.ids, lengths, together.extras)
    for i in range(3):
        extras = {name: extra[i : i + 1] for name, extra in together.extras.items()}
        one = codec._decode(together.ids[i : i + 1], lengths[i : i + 1], extras)
        torch.testing.assert_close(audio[i], one[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 3, 9, 10, 11, 100, 191, 401])
def test_decoding_gives_back_every_sample(codec, samples):
    rate = codec.sample_rate
    tokens = codec.encode((noise(codec, samples), rate))
    (audio,) = codec.decode(tokens)
    assert audio.shape == (codec.channels, samples)
    assert audio.dtype == torch.float32
    assert float(audio.abs().max()) <= 1
    other = codec.encode((noise(codec, samples), rate * 3 // 2))
    assert codec.decode(other)[0].shape == (codec.channels, samples)
    assert codec.decode(other, native=True)[0].shape == (codec.channels, -(-samples * 2 // 3))


def test_ids_depend_on_the_recording(codec):
    ids = codec.encode(noise(codec, 400)).ids
    assert len(ids.unique()) > 10
    assert not torch.equal(ids, codec.encode(noise(codec, 400, 1)).ids)


@pytest.mark.parametrize("samples", [17, 100, 333])
def test_pieces_give_the_ids_and_samples_of_the_whole(codec, samples):
    wave = noise(codec, samples)
    codec.piece = 1e6
    whole = codec.encode(wave)
    audio = codec.decode(whole)[0]
    for frames, steps in ((1, 1000), (2, 7), (5, 2)):
        codec.piece = frames / codec.frame_rate
        for chain in (module for module in codec.modules() if isinstance(module, Chain)):
            chain.steps = steps  # that its fine layers get at a time
        assert codec.encode(wave).equal(whole)
        torch.testing.assert_close(codec.decode(whole)[0], audio, rtol=0, atol=1e-5)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators returned and that are still alive; `peak` is their most at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, key):
        self.now -= self.alive.pop(key)


def most_bytes(function, argument):
    with LiveBytes() as bytes_:
        result = function(argument)
    return bytes_.peak, result


def test_a_longer_recording_takes_no_more_memory_than_its_ids_and_samples(codec, monkeypatch):
    monkeypatch.setattr("tokenzoo.tokenizers.audio.codec._FRAMES_TOGETHER", 10)
    codec.piece, codec.window, codec.overlap = 5 / codec.frame_rate, 10 / codec.frame_rate, 2 / codec.frame_rate
    short, long = noise(codec, 800), noise(codec, 6400)
    codec.encode(long)  # what is kept from the first call on is none of theirs
    encoding, decoding, tokens = [], [], []
    for wave in (short, long):
        peak, made = most_bytes(codec.encode, wave)
        encoding.append(peak)
        tokens.append(made)
        peak, _ = most_bytes(codec.decode, made)
        decoding.append(peak)
    ids = tokens[1].ids.nbytes - tokens[0].ids.nbytes
    samples = (long.numel() - short.numel()) * long.element_size()
    assert encoding[1] - encoding[0] < 2 * samples + 1.2 * ids + 4096  # the recording counts as a tensor and as an array
    assert decoding[1] - decoding[0] < 1.2 * samples + 2 * ids + 4096  # ids are compared with their bounds


def test_saved_tokens_decode_alike(codec, tmp_path):
    tokens = codec.encode([noise(codec, 100), noise(codec, 55)])
    for name in ("tokens.tok", "tokens.safetensors"):
        tokens.save(tmp_path / name)
        again = Tokens.load(tmp_path / name)
        assert again.equal(tokens)
        for a, b in zip(codec.decode(again), codec.decode(tokens), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["interleaved", "coarse_to_fine", "parallel", "delay"])
def test_layouts_are_exact_inverses(codec, layout):
    tokens = codec.encode([noise(codec, n, n) for n in (1, 30, 230, 90)])
    flat = tokens.flatten(layout)
    assert Tokens.unflatten(flat, tokens.spec, layout, extras=tokens.extras, meta=tokens.meta).equal(tokens)


def test_any_cut_of_an_interleaved_stream_holds_whole_past_frames(codec):
    tokens = codec.encode(noise(codec, 230))
    per_group = sum(max(tokens.spec.strides) // stride for stride in tokens.spec.strides)
    flat = tokens.flatten("interleaved")
    groups = flat.shape[1] // per_group
    early = Tokens.unflatten(flat[:, : per_group * (groups // 2)], tokens.spec, "interleaved")
    assert all(torch.equal(cut, whole[: len(cut)]) for cut, whole in zip(early.codes(), tokens.codes(), strict=True))
    for length, stride in zip(early.lengths[0].tolist(), tokens.spec.strides, strict=True):
        assert length == groups // 2 * max(tokens.spec.strides) // stride


def test_bitrates(codec):
    spec = codec.info
    top = spec.bits_per_second / 1000
    assert codec.codebooks_for(top) == spec.num_codebooks
    assert torch.equal(codec.encode(noise(codec, 50), target={"kbps": top}).ids, codec.encode(noise(codec, 50)).ids)
    for kbps in (top * 1.01, top / spec.num_codebooks * 0.9, 0, -1, math.nan):
        with pytest.raises(TokensError, match="kbit/s"):
            codec.codebooks_for(kbps)
    with pytest.raises(TokensError, match="by itself"):
        codec.encode(noise(codec, 50), target={"kbps": top, "snr": 3})
    if spec.variable == "codebooks":
        for number in range(1, spec.num_codebooks + 1):
            kbps = top * number / spec.num_codebooks
            assert codec.codebooks_for(kbps) == number
            assert codec.codebooks_for(max(kbps - 1e-6, top / spec.num_codebooks)) == max(1, number - 1)
            tokens = codec.encode(noise(codec, 50), target={"kbps": kbps})
            assert tokens.equal(codec.encode(noise(codec, 50), length=number))


def test_fewer_codebooks_are_a_prefix(codec):
    wave = noise(codec, 120)
    whole = codec.encode(wave)
    if whole.spec.variable != "codebooks":
        with pytest.raises(TokensError, match="fixed rate"):
            codec.encode(wave, length=1)
        return
    for number in range(1, whole.spec.num_codebooks + 1):
        short = codec.encode(wave, length=number)
        assert short.equal(whole.truncate(number))
        assert torch.equal(short.ids[:, :number], whole.ids[:, :number])
        assert codec.decode(short)[0].shape == wave.shape
    mixed = codec.encode([wave, wave], length=[1, 3])
    assert (mixed.lengths > 0).sum(1).tolist() == [1, 3]
    assert torch.equal(codec.decode(mixed)[1], codec.decode(mixed[1])[0])


def test_target_quality_finds_the_fewest_codebooks(codec):
    if codec.info.variable != "codebooks":
        pytest.skip("the number of codebooks is fixed")
    wave = noise(codec, 120)
    tokens = codec.encode(wave, target={"l1": 10.0})
    assert (tokens.lengths > 0).sum() == 1
    assert tokens.meta[0]["target"]["met"]
    best = codec.encode(wave, target={"snr": 300})
    assert (best.lengths > 0).sum() == codec.info.num_codebooks
    assert not best.meta[0]["target"]["met"]


def test_odd_recordings(codec):
    for wave in (torch.zeros(1, 50), torch.ones(1, 50), -1.5 * torch.ones(2, 50), noise(codec, 50).expand(codec.channels, -1)):
        tokens = codec.encode(wave)
        tokens.validate()
        assert bool(codec.decode(tokens)[0].isfinite().all())
    with pytest.raises(MediaError, match="no samples"):
        codec.encode(torch.zeros(1, 0))
    with pytest.raises(MediaError, match=r"item 1: .*not finite"):
        codec.encode([torch.zeros(1, 5), torch.full((1, 5), math.nan)])
    assert len(codec.encode([])) == 0


def test_mono_comes_back_as_mono(codec):
    assert codec.decode(codec.encode(torch.zeros(77)))[0].shape == (1, 77)
    assert codec.decode(codec.encode(torch.zeros(3, 77)))[0].shape == (codec.channels, 77)


def test_malformed_tokens_are_refused(codec):
    tokens = codec.encode(noise(codec, 100))
    holes = tokens.lengths.clone()
    if holes.shape[1] > 1:
        holes[:, 0] -= 1
        with pytest.raises(TokensError):
            codec.decode(dataclasses.replace(tokens, lengths=holes))
    with pytest.raises(WrongTokenizerError):
        codec.decode(dataclasses.replace(tokens, spec=dataclasses.replace(tokens.spec, digest="0" * 16)))


def test_training_reaches_the_whole_network_and_learns(codec):
    codec.train()
    batch = torch.stack([0.5 * torch.sin(torch.arange(200) * 0.1 * (k + 1)).expand(codec.channels, -1) for k in range(2)])
    optimizer = torch.optim.Adam(codec.parameters(), lr=2e-3)
    history = []
    for step in range(25):
        output = codec(batch, progress=step / 25)
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            assert not [
                name for name, p in codec.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
            ]
            assert output.reconstruction.shape == batch.shape
        optimizer.step()
        history.append(sum(float(output.losses[name].detach()) for name in ("waveform", "mel") if name in output.losses))
    assert history[-1] < 0.9 * history[0]


def test_bfloat16_decodes_to_float32(codec):
    codec.to(torch.bfloat16)
    tokens = codec.encode(noise(codec, 60))
    assert codec.decode(tokens)[0].dtype == torch.float32


def test_a_saved_codec_gives_the_same_tokens(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    again = type(codec).from_pretrained(tmp_path)
    wave = noise(codec, 90)
    assert torch.equal(again.encode(wave).ids, codec.encode(wave).ids)
