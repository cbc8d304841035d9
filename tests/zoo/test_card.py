import json
from importlib.resources import files

import pytest

from tokenzoo import info, list_models
from tokenzoo.card import Card, Source, allows_commercial_use, parse_card, read_cards
from tokenzoo.hub import find_adapter
from tokenzoo.registry import tokenizer_class
from tokenzoo.tokenizers.errors import ConfigError

SHA = "0123456789abcdef" * 4
COMMIT = SHA[:40]
FRONT = f"""license: apache-2.0
tags: [image]
tokenzoo:
  architecture: titok
  modality: image
  code_license: mit
  config: {{size: small}}
  source: {{repo: org/name, revision: {COMMIT}, file: model.safetensors, sha256: {SHA}, adapter: published}}
  size_mb: 335.5
  params: 83900000
  metrics: [{{name: rFID, value: 1.48}}]
"""


def card(front=FRONT, name="titok_s128.in1k", **options):
    return parse_card(name, f"---\n{front}---\n\n# TiTok\n\nProse.\n", **options)


def test_a_card_says_what_its_front_matter_says():
    made = card()
    assert (made.name, made.variant, made.architecture, made.modality) == ("titok_s128.in1k", "titok_s128", "titok", "image")
    assert made.source == Source(repo="org/name", revision=COMMIT, file="model.safetensors", sha256=SHA, adapter="published")
    assert (made.license, made.code_license, made.commercial) == ("apache-2.0", "mit", True)
    assert made.config == {"size": "small"}
    assert (made.size_mb, made.params) == (335.5, 83900000)
    assert not made.bundled
    assert not made.default
    assert made.body == "# TiTok\n\nProse.\n"
    summary = json.loads(json.dumps(made.summary()))
    assert summary["source"]["revision"] == COMMIT
    assert summary["metrics"] == [{"name": "rFID", "value": 1.48}]


def test_a_source_without_a_repository_is_bundled():
    front = FRONT.replace(f"repo: org/name, revision: {COMMIT}, ", "").replace("adapter: published", "adapter: null")
    assert card(front, package="elsewhere").bundled
    assert card(front, package="elsewhere").package == "elsewhere"
    assert card(front).source.adapter is None


@pytest.mark.parametrize("where", ['url: "https://files.example/a.pth?dl=1"', "page: https://a.example/#weights"])
def test_a_source_with_an_address_is_neither_bundled_nor_on_the_hub(where):
    made = card(FRONT.replace(f"repo: org/name, revision: {COMMIT}, file: model.safetensors", f"{where}, file: a.pth"))
    assert (made.bundled, made.source.outside, made.source.repo) == (False, True, None)
    kind, _, address = where.partition(": ")
    assert made.summary()["source"][kind] == address.strip('"')


def test_windows_line_ends_and_a_byte_order_mark_are_read():
    text = f"\ufeff---\n{FRONT}---\n# T\n".replace("\n", "\r\n")
    assert parse_card("titok_s128.in1k", text).params == 83900000


@pytest.mark.parametrize(
    ("license_id", "allowed"),
    [
        *((name, True) for name in ("apache-2.0", "mit", "bsd", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "CC-BY-SA-4.0")),
        *((name, False) for name in ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "apple-amlr", "unknown", "other", "openrail", "")),
    ],
)
def test_only_licences_known_to_allow_it_allow_commercial_use(license_id, allowed):
    assert allows_commercial_use(license_id) == allowed


def test_a_card_may_say_itself_whether_commercial_use_is_allowed():
    assert not card(FRONT.replace("tokenzoo:\n", "tokenzoo:\n  commercial: false\n")).commercial
    other = FRONT.replace("license: apache-2.0", "license: other", 1)
    assert not card(other).commercial
    assert card(other.replace("tokenzoo:\n", "tokenzoo:\n  commercial: true\n")).commercial


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: apache-2.0\n", "", "lacks 'license', which has no default"),
        ("  architecture: titok\n", "", "tokenzoo lacks 'architecture'"),
        ("architecture: titok", "architecture: tokenzoo.tokenizers.image.titok:TiTok", "never an import path"),
        ("architecture: titok", "architecture: os.system", "never an import path"),
        ("modality: image", "modality: smell", "image, video, audio, text"),
        ("  params: 83900000", "  parms: 83900000", "tokenzoo has unknown keys: parms"),
        ("adapter: published", "adaptor: published", "tokenzoo.source has unknown keys: adaptor"),
        ("file: model.safetensors", "file: ../../etc/passwd", "relative path"),
        ("file: model.safetensors", "file: /etc/passwd", "relative path"),
        ("repo: org/name", "repo: https://evil/org/name", "org/name"),
        (f"revision: {COMMIT}", "revision: main", "40 hexadecimal digits"),
        (f"revision: {COMMIT}", f"revision: {'1' * 40}", "put it in quotes"),
        (f"sha256: {SHA}", "sha256: abc", "64 hexadecimal digits"),
        (f"repo: org/name, revision: {COMMIT}", f"revision: {COMMIT}", "weights that are not on the Hub have no revisions"),
        (f"revision: {COMMIT}", "url: https://files.example/a.pth", "a file of the Hub needs no other address"),
        (f"repo: org/name, revision: {COMMIT}", f"page: https://a.example/, revision: {COMMIT}", "have no revisions"),
        (f"repo: org/name, revision: {COMMIT}", "url: http://files.example/a.pth", "an https address"),
        (f"repo: org/name, revision: {COMMIT}", "url: file:///etc/passwd", "an https address"),
        (f"repo: org/name, revision: {COMMIT}", "page: ask the authors", "an https address"),
        (f"repo: org/name, revision: {COMMIT}, file: model.safetensors", "file: model.bin", "to be safetensors"),
        ("params: 83900000", "params: many", "of type int"),
        ("params: 83900000", "params: true", "of type int"),
        ("config: {size: small}", "config: small", "of type dict"),
        ("license: apache-2.0", "license: [", "not YAML"),
        ("license: apache-2.0", "license: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_a_malformed_card_is_refused_by_name(old, new, message):
    assert old in FRONT
    with pytest.raises(ConfigError, match=r"titok_s128\.in1k") as caught:
        card(FRONT.replace(old, new, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "# only prose\n", "---\nlicense: mit\n", "---\n- a\n- b\n---\n"])
def test_front_matter_is_required(text):
    with pytest.raises(ConfigError, match="front matter"):
        parse_card("a.b", text)


@pytest.mark.parametrize("name", ["titok", "TiTok.in1k", "a.b.c", ".in1k", "titok.", "a b.c", "../a.b"])
def test_a_name_is_a_variant_and_a_tag(name):
    with pytest.raises(ConfigError, match=r"variant\.tag"):
        card(name=name)


def test_cards_are_read_from_a_package(site):
    site.card("tiny.b")
    site.card("tiny.a")
    (site.cards / "README.md").write_text("not a card")
    found = list(read_cards("tiny_cards"))
    assert [made.name for made in found] == ["tiny.a", "tiny.b"]
    assert all(isinstance(made, Card) and made.package == "tiny_cards" for made in found)


@pytest.mark.parametrize("name", list_models())
def test_each_of_our_cards_describes_a_tokenizer(name):
    made = info(name)
    cls = tokenizer_class(made.architecture)
    assert cls.modality == made.modality
    cls.config_class.from_dict(made.config)
    find_adapter(made, cls)
    assert len(made.body) > 200
    assert "@@" not in made.text, "a figure still to be filled in"
    if made.bundled:
        assert files(made.package).joinpath(made.source.file).is_file()
        assert made.source.sha256
