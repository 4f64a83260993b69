"""The parser class of all programs: both spellings of an option, and errors of one line."""

import pytest

from llava_next_ar.hub.command_line import BAD_INPUT, CommandParser, program_name, stop


@pytest.fixture
def parser(monkeypatch) -> CommandParser:
    monkeypatch.setattr("sys.argv", ["llava-next-ar ask"])
    made = CommandParser()
    made.add_argument("text", nargs="*")
    made.add_argument("--num-frames", type=int)
    made.add_argument("--model_config")
    made.add_argument_group("videos").add_argument("--max-frames", type=int)
    return made


@pytest.mark.parametrize(
    "words", [["--num-frames", "3"], ["--num_frames", "3"], ["--num_frames=3"], ["--num-frames=3"]]
)
def test_an_option_has_two_spellings(parser, words):
    assert parser.parse_args(words).num_frames == 3


def test_either_spelling_may_be_the_one_that_is_added(parser):
    assert parser.parse_args(["--model-config", "a_b", "--max_frames", "5"]).model_config == "a_b"
    assert parser.parse_args(["--model_config=a_b-c", "--max_frames", "5"]).max_frames == 5


def test_values_and_words_after_the_end_of_options_stay_as_they_are(parser):
    assert parser.parse_args(["a_b", "--", "--num_frames", "c_d"]).text == ["a_b", "--num_frames", "c_d"]


def test_options_of_a_sub_command_have_two_spellings():
    parser = CommandParser("program")
    parser.add_subparsers(dest="job").add_parser("tokens").add_argument("--max-samples", type=int)
    assert parser.parse_args(["tokens", "--max_samples", "7"]).max_samples == 7


def test_an_abbreviation_is_an_error(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--num", "3"])
    assert "unrecognized arguments: --num" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--num-framez", "--num_framez", "--num_framez=3"])
def test_an_unknown_option_is_one_line_with_the_nearest_one(parser, word, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse_args([word])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == BAD_INPUT == 2
    assert line == (
        f"llava-next-ar ask: unrecognized arguments: {word}; did you mean --num-frames? --help lists the options"
    )


def test_a_bad_value_is_one_line(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--num-frames", "many"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llava-next-ar ask: argument --num-frames: invalid int value: 'many'")


@pytest.mark.parametrize(
    ("started", "name"), [("/a/scripts/ask.py", "ask.py"), ("llava-next-ar ask", "llava-next-ar ask")]
)
def test_stop_prints_one_line_with_the_name_of_the_program(started, name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [started])
    with pytest.raises(SystemExit) as end:
        stop(ValueError("first line\n   second"))
    assert end.value.code == 2 and program_name() == name
    assert capsys.readouterr().err == f"{name}: first line second\n"
