"""The predicted memory of the recipes: the table of README.md is what the benchmark prints."""

import pytest
from documents import read

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
from llava_next_ar.experiments.benchmarks.benchmark import main
from llava_next_ar.experiments.benchmarks.recipe_memory import RECIPES
from llava_next_ar.experiments.benchmarks.training import SHAPES, shape_config


def rows_of(text: str) -> dict[str, list[str]]:
    """Recipe -> the other cells of its row in a Markdown table."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows if row[0] in RECIPES}


def gib(cell: str) -> float:
    number, unit = cell.split()
    return float(number) / {"GiB": 1, "MiB": 1024}[unit]


def test_the_table_has_a_row_for_each_recipe_that_was_asked_for(capsys):
    main(["recipe-memory", "--sizes", "small", "--recipes", "lora", "qlora"])
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["lora", "qlora"]
    num_video = LlavaNextARConfig(**shape_config("small")).frame_token_layout.num_tokens(16)
    assert {row[0] for row in rows.values()} == {rows["lora"][0]} and num_video < int(
        rows["lora"][0]
    ) < num_video + 100
    assert gib(rows["qlora"][1]) < gib(rows["lora"][1])


def test_the_readme_names_each_recipe():
    assert set(rows_of(read("README.md"))) == set(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("size", [size for size in SHAPES if size != "small"])
def test_the_table_of_the_readme_is_what_the_benchmark_prints(size, capsys):
    main(["recipe-memory", "--sizes", size])
    printed, documented = rows_of(capsys.readouterr().out), rows_of(read("README.md"))
    head = next(line for line in read("README.md").splitlines() if line.startswith("| recipe"))
    place = [cell.strip().lower() for cell in head.strip("|").split("|")].index(size) - 1
    assert {name: row[place] for name, row in documented.items()} == {
        name: f"{gib(row[1]):.1f} GiB" for name, row in printed.items()
    }
