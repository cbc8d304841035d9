"""Training and fine-tuning: recipes, folders of media, one accelerate loop with exact resume."""

from tokenzoo.training.loop import run_recipe, train
from tokenzoo.training.recipe import DataRecipe, Recipe

__all__ = ["DataRecipe", "Recipe", "run_recipe", "train"]
