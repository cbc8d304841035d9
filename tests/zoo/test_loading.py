"""Names, folders and repositories in our own layout."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

import tokenzoo
from tokenzoo.tokenizers.errors import ConfigError, DownloadError, UnknownTokenizerError, WeightsError

REPO = "org/ours"


@pytest.fixture
def photo():
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tiny, tmp_path):
    tok = tiny.make(3, codes=8)
    tok.name, tok.card_text = "tiny.mine", "---\nlicense: mit\n---\n# Mine\n"
    return tok.save_pretrained(tmp_path / "saved" / "deep")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- folders


def test_a_saved_tokenizer_comes_back_the_same(folder, tiny, photo, no_network):
    tok = tokenzoo.load(folder)
    made = tiny.make(3, codes=8)
    assert type(tok) is tiny.Tiny
    assert not tok.training
    assert (tok.name, tok.digest, tok.revision) == ("tiny.mine", made.digest, None)
    assert tok.config == made.config
    assert tok.card_text == "---\nlicense: mit\n---\n# Mine\n"
    assert torch.equal(tok.encode(photo).ids, made.encode(photo).ids)
    assert tok.encode(photo).equal(tokenzoo.load(str(folder)).encode(photo))
    assert tiny.Tiny.from_pretrained(folder).digest == made.digest


def test_the_layout_on_disk(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == {
        "tokenzoo": 1,
        "architecture": "tiny",
        "name": "tiny.mine",
        "config": {"codes": 8, "dim": 4},
    }
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tokenizer_without_a_card_gets_one_that_claims_nothing(tiny, tmp_path):
    text = (tiny.make().save_pretrained(tmp_path) / "README.md").read_text()
    assert "license: unknown" in text
    assert "not known" in text


def test_tied_and_strided_weights_are_saved(tiny, tmp_path):
    tok = tiny.make()
    tok.up.weight = tok.down.weight
    tok.codebook = torch.nn.Parameter(torch.randn(4, 16).T)
    tok.save_pretrained(tmp_path)
    assert tokenzoo.load(tmp_path).digest == tok.digest


def test_weights_stored_in_half_precision_load_in_single(tiny, tmp_path, photo):
    tiny.make().half().save_pretrained(tmp_path)
    tok = tokenzoo.load(tmp_path)
    assert tok.dtype == torch.float32
    assert tok.digest == tiny.make().half().float().digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_digest_is_of_the_weights_as_stored(folder, dtype, photo):
    tok, full = tokenzoo.load(folder, dtype=dtype), tokenzoo.load(folder)
    assert tok.dtype == torch.bfloat16
    assert tok.digest == full.digest
    assert full.decode(tok.encode(photo))[0].shape == (3, 8, 8)


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"dtype": "float17"}, {"dtype": 3}, {"device": "toaster"}, {"revision": "main"}]
)
def test_options_that_mean_nothing_are_refused(folder, options):
    with pytest.raises(ConfigError, match=r"dtype=|device=|no revisions"):
        tokenzoo.load(folder, **options)


def test_loading_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    tokenzoo.load(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_left_uninitialised(folder):
    tok = tokenzoo.load(folder)
    assert torch.equal(tok.steps, torch.arange(4))  # not in the file


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"architecture": "tinny"}, UnknownTokenizerError, "no architecture 'tinny': did you mean 'tiny'"),
        ({"architecture": "tiny:Tiny"}, ConfigError, "never an import path"),
        ({"architecture": "os.system"}, ConfigError, "never an import path"),
        ({"architecture": None}, ConfigError, "never an import path"),
        ({"config": {"codes": 8, "auto_map": "x.y"}}, ConfigError, "no key 'auto_map'"),
        ({"config": {"codes": "8"}}, ConfigError, "refuses these values"),
        ({"config": [8]}, ConfigError, "'config' an object"),
        ({"name": 8}, ConfigError, "'name' to be a string"),
        ({"tokenzoo": 2}, ConfigError, "format 2, expected 1 to 1: a newer one needs a newer tokenzoo"),
        ({"tokenzoo": "1"}, ConfigError, "format '1'"),
        ({"tokenzoo": True}, ConfigError, "format True"),
        ({"auto_map": {"AutoModel": "x.y"}}, ConfigError, "unknown keys: auto_map"),
        ({"config": {"codes": 9}}, WeightsError, r"1 misshapen \(codebook \(8, 4\) instead of \(9, 4\)\)"),
    ],
)
def test_a_config_only_picks_from_the_registry(folder, values, error, message):
    change(folder, **values)
    with pytest.raises(error, match=message):
        tokenzoo.load(folder)


def test_a_folder_that_holds_nothing_of_ours_is_refused(folder, tiny, tmp_path):
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        tokenzoo.load(folder)
    assert (folder / "model.safetensors").exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        tokenzoo.load(folder)
    for text, message in [("{", "not a readable JSON"), ("[]", "not written by tokenzoo"), ('{"model": 1}', "card's name")]:
        (folder / "model.safetensors").touch()
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            tokenzoo.load(folder)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        tokenzoo.load(tmp_path)


def test_another_architectures_class_refuses(folder, tiny):
    class Other(tiny.Tiny):
        architecture = "other"

    with pytest.raises(ConfigError, match="holds the architecture 'tiny', and Other is 'other'"):
        Other.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"tokenzoo\.load picks the class"):
        tokenzoo.Tokenizer.from_pretrained(folder)


# -- names


def test_names_are_listed_by_pattern_modality_and_licence(site):
    site.card("tiny.free")
    site.card("tiny.research", license="cc-by-nc-4.0")
    names = tokenzoo.list_models()
    assert names == sorted(names)
    assert {"tiny.free", "tiny.research"} <= set(names)
    assert tokenzoo.list_models("*iny.f*") == ["tiny.free"]
    assert tokenzoo.list_models("tiny.*", commercial=True) == ["tiny.free"]
    assert tokenzoo.list_models("tiny.*", commercial=False) == ["tiny.research"]
    assert tokenzoo.list_models("tiny.*", modality="audio") == []
    assert len(tokenzoo.list_models("tiny.*", modality="image")) == 2
    assert tokenzoo.info("tiny.free").license == "mit"


def test_an_unknown_name_is_answered_with_close_ones(site, tmp_path):
    site.card("tiny.a")
    for call in (tokenzoo.load, tokenzoo.info):
        with pytest.raises(UnknownTokenizerError, match=r"no tokenizer is called 'tiny\.b': did you mean 'tiny\.a'"):
            call("tiny.b")
    with pytest.raises(LookupError, match="for a Hub repository write hf-hub:org/name"):
        tokenzoo.load("org/name")
    with pytest.raises(UnknownTokenizerError, match="there is no folder"):
        tokenzoo.load(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="existing folder, or a Hub repository"):
        tokenzoo.load("hf-hub:one/two/three")
    with pytest.raises(UnknownTokenizerError):
        tokenzoo.load("")


def test_a_folder_does_not_hide_a_card_of_its_name(site, folder, tiny, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert tokenzoo.load("deep").digest == tiny.make(3, codes=8).digest
    safetensors.torch.save_file(tiny.make(4).state_dict(), site.cards / "w.safetensors")
    site.card("deep.a", source={"file": "w.safetensors"})
    assert tokenzoo.load("deep").digest == tiny.make(4).digest
    assert tokenzoo.load("./deep").digest == tiny.make(3, codes=8).digest


def test_bundled_weights_need_no_network_and_no_cache(site, cache, tiny, no_network):
    path = site.cards / "w.safetensors"
    safetensors.torch.save_file(tiny.make(4).half().state_dict(), path)
    source = {"file": "w.safetensors", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    site.card("tiny.a", source=source)
    tok = tokenzoo.load("tiny")
    assert (tok.name, tok.revision, tok.dtype) == ("tiny.a", None, torch.float32)
    assert tokenzoo.info("tiny").bundled
    assert not cache.exists()
    with pytest.raises(ConfigError, match="has no revisions"):
        tokenzoo.load("tiny", revision="main")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(WeightsError, match="to have sha256"):
        tokenzoo.load("tiny")
    path.unlink()
    with pytest.raises(DownloadError, match="reinstall the package"):
        tokenzoo.load("tiny")


# -- repositories in our own layout


def test_push_and_load_back(hub, folder, tiny, photo, monkeypatch):
    hub.write_token = "secret"
    tok = tokenzoo.load(folder)
    url = tok.push_to_hub(REPO, token="secret", message="First")
    commit = hub.repos[REPO].refs["main"]
    assert url == f"{hub.endpoint}/{REPO}/commit/{commit}"
    assert set(hub.repos[REPO].commits[commit]) == {"config.json", "model.safetensors", "README.md"}
    assert not [r for r in hub.seen("cdn") if "secret" in str(r)]
    back = tokenzoo.load(f"hf-hub:{REPO}")
    assert (back.name, back.digest, back.revision, back.card_text) == ("tiny.mine", tok.digest, commit, tok.card_text)
    assert torch.equal(back.encode(photo).ids, tok.encode(photo).ids)
    hub.stop()
    assert tokenzoo.load(f"hf-hub:{REPO}").info == back.info
    assert tiny.Tiny.from_pretrained(REPO, revision=commit).card_text == tok.card_text


def test_the_hub_may_refuse_a_push(hub, folder):
    hub.write_token = "secret"
    with pytest.raises(DownloadError, match=r"could not upload to org/ours .*that your token may write there"):
        tokenzoo.load(folder).push_to_hub(REPO, token="wrong")
    assert REPO not in hub.repos


def test_two_revisions_of_a_repository(hub, tiny):
    commits = []
    for seed in (1, 2):
        tiny.make(seed).push_to_hub(REPO)
        commits.append(hub.repos[REPO].refs["main"])
    assert tokenzoo.load(f"hf-hub:{REPO}", revision=commits[0]).digest == tiny.make(1).digest
    assert tokenzoo.load(f"hf-hub:{REPO}").digest == tiny.make(2).digest


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"architecture": "tinny"}, UnknownTokenizerError),
        ({"architecture": "os:system"}, ConfigError),
        ({"config": {"kodes": 8}}, ConfigError),
        ({"tokenzoo": 99}, ConfigError),
    ],
)
def test_a_repository_whose_config_is_refused_leaves_the_cache_usable(hub, folder, tiny, values, error):
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(folder, **values)
    hub.repo(REPO).commit({path.name: path.read_bytes() for path in folder.iterdir()})
    for _ in range(2):
        with pytest.raises(error):
            tokenzoo.load(f"hf-hub:{REPO}")
    hub.repo(REPO).commit(good)
    assert tokenzoo.load(f"hf-hub:{REPO}").digest == tiny.make(3, codes=8).digest


def test_an_unknown_architecture_is_refused_before_its_weights_are_downloaded(hub, folder):
    change(folder, architecture="tinny")
    hub.repo(REPO).commit({path.name: path.read_bytes() for path in folder.iterdir()})
    with pytest.raises(UnknownTokenizerError):
        tokenzoo.load(f"hf-hub:{REPO}")
    assert not hub.seen("cdn")


def test_damaged_weights_of_a_repository_are_dropped_from_the_cache(hub, folder, cache, tiny):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repo(REPO).commit({**files, "model.safetensors": b"damaged"})
    with pytest.raises(WeightsError, match="removed from the cache"):
        tokenzoo.load(f"hf-hub:{REPO}")
    hub.repo(REPO).commit(files)
    assert tokenzoo.load(f"hf-hub:{REPO}").digest == tiny.make(3, codes=8).digest


def test_a_repository_without_a_card_or_of_another_layout(hub, folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    del files["README.md"]
    hub.repo(REPO).commit(files)
    assert tokenzoo.load(f"hf-hub:{REPO}").card_text == ""
    hub.repo("org/other").commit({"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(ConfigError, match="not written by tokenzoo"):
        tokenzoo.load("hf-hub:org/other")
    with pytest.raises(DownloadError, match=r"org/none/config\.json"):
        tokenzoo.load("hf-hub:org/none")


def test_initialisations_that_sample_until_they_fit_still_end(tiny, tmp_path):
    class Truncated(tiny.Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.codebook.data.fill_(5)  # as memory that was never initialised may hold
            torch.nn.init.trunc_normal_(self.codebook, std=0.02, a=-0.01, b=0.01)

    tok = Truncated(tiny.TinyConfig())
    assert Truncated.from_pretrained(tok.save_pretrained(tmp_path)).digest == tok.digest
