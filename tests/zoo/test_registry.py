import logging

import pytest

from tokenzoo import registry
from tokenzoo.tokenizers.errors import ConfigError, UnknownTokenizerError


def test_another_distribution_adds_an_architecture_and_cards(site, tiny):
    site.card("tiny.a")
    assert "tiny" in registry.architectures()
    assert registry.tokenizer_class("tiny") is tiny.Tiny
    assert registry.find_card("tiny.a").package == "tiny_cards"


def test_it_is_gone_when_the_distribution_is():
    assert "tiny" not in registry.architectures()


@pytest.mark.parametrize(("name", "meant"), [("tok", "titok"), ("one_d_pice", "one_d_piece"), ("x:Y", None)])
def test_an_unknown_architecture_is_answered_with_close_names(name, meant):
    with pytest.raises(UnknownTokenizerError, match=f"did you mean '{meant}'" if meant else "known are .*titok"):
        registry.tokenizer_class(name)


def test_builtin_architectures_are_not_shadowed_silently(site, caplog):
    site.entry_points("[tokenzoo.tokenizers]\ntitok = tiny:Tiny\ntiny = tiny:Tiny\n")
    with caplog.at_level(logging.WARNING):
        assert registry.tokenizer_class("titok").__module__ == "tokenzoo.tokenizers.image.titok"
        registry.architectures()
    assert "distribution tiny_tokenizers: its architecture 'titok' is left out" in caplog.text


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("tiny = tiny:make", "subclass of tokenzoo.Tokenizer"),
        ("tiny = tiny:TinyConfig", "subclass of tokenzoo.Tokenizer"),
        ("tiny = tiny:not_a_tokenizer", "subclass of tokenzoo.Tokenizer"),
        ("small = tiny:Tiny", "architecture to be 'small'"),
    ],
)
def test_an_entry_point_has_to_be_a_tokenizer_of_its_name(site, points, message):
    site.entry_points(f"[tokenzoo.tokenizers]\n{points}\n")
    with pytest.raises(ConfigError, match=message):
        registry.tokenizer_class(points.split(" ")[0])


def test_broken_third_party_cards_do_not_take_the_others_down(site, caplog):
    ours = [name for name in registry.cards() if not name.startswith("tiny")]
    site.card("tiny.a")
    (site.cards / "tiny.b.md").write_text("no front matter")
    registry.refresh()
    with caplog.at_level(logging.WARNING):
        names = list(registry.cards())
    assert set(ours) < set(names)
    assert "tiny.b" not in names
    assert "distribution tiny_tokenizers: its cards are left out: card 'tiny.b'" in caplog.text
    site.entry_points("[tokenzoo.cards]\ngone = no_such_package\n")
    assert list(registry.cards()) == ours


def test_two_cards_of_one_name_are_not_shadowed_silently(site, caplog):
    site.card("tiny.a")
    site.entry_points("[tokenzoo.cards]\nagain = tiny_cards\n", dist="second")
    with caplog.at_level(logging.WARNING):
        assert [name for name in registry.cards() if name.startswith("tiny")] == ["tiny.a"]
    assert "'tiny.a' is left out" in caplog.text


def test_the_tag_may_be_left_out_where_it_is_clear(site):
    site.card("tiny.a")
    assert registry.find_card("tiny").name == "tiny.a"
    site.card("tiny.b")
    with pytest.raises(UnknownTokenizerError, match=r"several checkpoints: choose one of tiny\.a, tiny\.b"):
        registry.find_card("tiny")
    site.card("tiny.c", default=True)
    assert registry.find_card("tiny").name == "tiny.c"
    site.card("tiny.d", default=True)
    with pytest.raises(UnknownTokenizerError, match=r"choose one of tiny\.c, tiny\.d"):
        registry.find_card("tiny")


@pytest.mark.parametrize(("name", "meant"), [("tiny.aa", "tiny.a"), ("tinny", "tiny"), ("tyni.a", "tiny.a")])
def test_an_unknown_name_is_answered_with_close_names(site, name, meant):
    site.card("tiny.a")
    with pytest.raises(UnknownTokenizerError, match=f"'{meant}'"):
        registry.find_card(name)


@pytest.mark.parametrize("architecture", registry.architectures())
def test_each_architecture_is_of_its_key(architecture):
    assert registry.tokenizer_class(architecture).architecture == architecture
