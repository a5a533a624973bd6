"""Recipes: what YAML gives back, and one line with the nearest valid value for everything that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.recipe import PRESETS, Recipe, float_recipe, preset
from specquant.exporter.recipe_checks import STAGES

FULL = Recipe(
    name="mine",
    a_bits=8,
    basis="dft",
    k=9,
    smooth_grid=(0.25, 0.5),
    budget="entropy",
    damping=0.05,
    descents=1,
    asymmetry=0.25,
    seed=7,
    overrides={"down_proj": {"a_bits": 16, "k": 3}, "o_proj": {"group_size": 32, "act_group": 0}},
)


def refused(message: str, **values: Any) -> None:
    with pytest.raises(SpecQuantError, match=message) as caught:
        Recipe.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", [*PRESETS.values(), float_recipe("float16"), FULL], ids=lambda r: r.name)
def test_yaml_round_trip(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_file_says_what_differs_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: paper\na_bits: 8\ndamping: 1\n")
    recipe = Recipe.from_yaml(path)
    assert (recipe.basis, recipe.k, recipe.a_bits, recipe.damping) == ("dft", preset("paper").k, 8, 1.0)


@pytest.mark.parametrize(
    ("a_bits", "act_group", "features"), [(8, -1, 0), (4, -1, 64), (8, 32, 32), (4, 0, 0), (16, 64, 0)]
)
def test_activation_groups(a_bits: int, act_group: int, features: int) -> None:
    assert Recipe(a_bits=a_bits, act_group=act_group).activation_group == features


def test_overrides() -> None:
    assert [FULL.at(stage).k for stage in STAGES] == [9, 9, 9, 3]
    assert [FULL.at(stage).act_group for stage in STAGES] == [FULL.act_group, 0, FULL.act_group, FULL.act_group]
    assert FULL.at("down_proj").overrides == {}
    assert [FULL.rank(stage) for stage in STAGES] == [17, 17, 17, 5]
    assert (preset("klt").rank("o_proj"), float_recipe().rank("o_proj")) == (preset("klt").k, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w_bits": 3}, "w_bits = 3 is not available; nearest: 4"),
        ({"w_bits": 12}, "w_bits = 12 is not available; nearest: 16"),
        ({"a_bits": 1}, "a_bits = 1 is not available; nearest: 2"),
        ({"a_bits": 9}, "a_bits = 9 is not available; nearest: 8"),
        ({"group_size": 60}, "group size 60 is not a multiple of 8; nearest: 64"),
        ({"group_size": 3}, "group size 3 is not a multiple of 8; nearest: 8"),
        ({"group_size": 48, "a_bits": 4}, "group_size 48 and act_group 64 do not nest.*both 48"),
        ({"act_group": -8}, "act_group must be -1 or more, not -8"),
        ({"group_size": -8}, "group_size must be 0 or more, not -8"),
        ({"k": 0}, "k must be 1 or more, not 0"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"sequence_length": 8}, "sequence_length 8 is too short; use 16"),
        ({"damping": 0.0}, r"damping 0\.0 is not in \(0, 1\]"),
        ({"damping": float("nan")}, "damping nan"),
        ({"asymmetry": 1.5}, r"asymmetry 1\.5 is not in \[0, 1\]"),
        ({"asymmetry": float("nan")}, "asymmetry nan"),
        ({"descents": -1}, "descents must be 0 or more, not -1"),
        ({"seed": -1}, "seed -1 is not in 0…2"),
        ({"seed": 2**64}, "seed 18446744073709551616 is not in"),
        ({"smooth_grid": []}, "smooth_grid must hold exponents"),
        ({"clip_grid": []}, "clip_grid must hold shares"),
        ({"clip_grid": [0.9, 0.0]}, "clip_grid must hold shares"),
        ({"hadamard": 48}, "hadamard 48 is not 0 or a power of two.*nearest: 64"),
        ({"hadamard": 4}, "hadamard 4 is not 0.*nearest: 8"),
        ({"hadamard": 9999}, "hadamard 9999 is not 0.*nearest: 4096"),
        ({"smooth_grid": [0.5, 2]}, "smooth_grid must hold exponents"),
        ({"basis": "fft"}, "basis = 'fft' is not one of none, dft, klt"),
        ({"budget": "l1"}, "budget = 'l1' is not one of act, entropy"),
        ({"rounding": "awq"}, "rounding = 'awq' is not one of rtn, gptq"),
        ({"w_bits": 16}, "16-bit weights and 8-bit activations.*--a-bits 16"),
        ({"basis": "none"}, "subtract needs a basis"),
        ({"overrides": {"q_proj": {"k": 8}}}, "no stage 'q_proj' to override; the stages are qkv_proj"),
        ({"overrides": {"o_proj": {"seed": 8}}}, "'seed' cannot differ by stage"),
        ({"overrides": {"o_proj": {"a_bits": 1}}}, r"o_proj\.a_bits = 1 is not available; nearest: 2"),
        ({"overrides": {"o_proj": {"w_bits": 16}}}, "o_proj has 16-bit weights and 8-bit activations"),
        ({"overrides": {"o_proj": {"group_size": 20}}}, "group size 20 is not a multiple of 8; nearest: 24"),
        ({"overrides": {"o_proj": {"k": 0}}}, "k must be 1 or more"),
        ({"overrides": {"o_proj": {"k": "8"}}}, r"o_proj\.k must be of type int, not '8'"),
        ({"overrides": {"o_proj": {"subtract": 1}}}, r"o_proj\.subtract must be of type bool"),
        ({"overrides": {"o_proj": 8}}, "overrides of o_proj must be a mapping"),
        ({"overrides": 8}, "overrides must be of type dict"),
        ({"groupsize": 64}, "unknown field 'groupsize'; known: name, w_bits"),
        ({"k": 8.0}, r"k must be of type int, not 8\.0"),
        ({"k": True}, "k must be of type int, not True"),
        ({"smooth": 1}, "smooth must be of type bool, not 1"),
        ({"basis": 3}, "basis must be of type str"),
        ({"smooth_grid": ["a"]}, "smooth_grid must be of type list of numbers"),
        ({"smooth_grid": 0.5}, "smooth_grid must be of type list of numbers"),
        ({"preset": "best"}, "no preset 'best'; there are klt, refined, fast, paper"),
        ({"preset": ["klt"]}, "no preset "),
    ],
)
def test_what_cannot_be(values: dict[str, Any], message: str) -> None:
    refused(message, **values)


@pytest.mark.parametrize("text", ["- a", "just text", "k: [", "k: !!python/object/apply:os.getcwd []", "", "\udcff"])
def test_files_that_hold_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpecQuantError, match=r"recipe .*recipe\.yaml: (expected a mapping|cannot be read)") as caught:
        Recipe.from_yaml(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecQuantError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("recipe", "n", "message"),
    [
        (
            Recipe(group_size=128, act_group=128),
            576,
            "group_size 128 does not divide the 576 .* qkv_proj; nearest: 144",
        ),
        (Recipe(group_size=64, act_group=64), 44, r"group_size 64 does not divide .*; use 0 \(no groups\)"),
        (Recipe(group_size=0, act_group=40), 96, "act_group 40 does not divide .*; nearest: (32|48)"),
        (Recipe(basis="dft", k=40, group_size=0, act_group=0), 64, "k = 40 is too large for basis dft.*nearest: 32"),
        (Recipe(k=100), 64, "k = 100 is too large for basis klt.*nearest: 64"),
    ],
)
def test_recipes_that_do_not_fit_a_model(recipe: Recipe, n: int, message: str) -> None:
    with pytest.raises(SpecQuantError, match=message):
        recipe.check_shapes({"qkv_proj": n})


def test_recipes_that_just_fit() -> None:
    Recipe(basis="dft", k=32).check_shapes({"qkv_proj": 64})
    Recipe(k=64).check_shapes({"qkv_proj": 64})
    float_recipe().check_shapes({"qkv_proj": 7})


def test_what_is_printed_is_plain_yaml() -> None:
    assert yaml.safe_load(FULL.to_yaml())["smooth_grid"] == [0.25, 0.5]
