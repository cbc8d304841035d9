import pytest

from tokenzoo.tokenizers.errors import ConfigError
from tokenzoo.training import Recipe


def test_the_bundled_recipe_is_found_by_name():
    recipe = Recipe.read("one_d_piece_nano")
    assert recipe.architecture == "one_d_piece_nano"
    assert recipe.data.folder == ""
    assert recipe.eval_lengths == (16, 64, 128)


def test_a_file_is_read_and_whole_numbers_may_stand_for_floats(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('start = "one_d_piece_nano"\nlearning_rate = 1\n[data]\ninclude = ["a/*"]\n')
    recipe = Recipe.read(file)
    assert recipe.learning_rate == 1.0
    assert recipe.data.include == ("a/*",)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start = 'x'\nstep = 3", "did you mean 'steps'"),
        ("start = 'x'\n[data]\nfolders = 'y'", "did you mean 'folder'"),
        ("start = 'x'\nsteps = '3'", "expected steps to be a int"),
        ("start = 'x'\nfreeze = 'code'", "expected freeze to be a list"),
        ("steps = 3", "either architecture .* or start"),
        ("start = ", "is not TOML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, message):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Recipe.read(file)


def test_a_missing_recipe_is_refused():
    with pytest.raises(ConfigError, match="found nothing at nowhere"):
        Recipe.read("nowhere")
