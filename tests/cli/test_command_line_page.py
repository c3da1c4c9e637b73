"""The page of the command line against what the commands declare."""

import command_line_page


def test_the_page_is_what_the_commands_declare() -> None:
    anew = "run .venv/bin/python tests/command_line_page.py"
    assert command_line_page.PAGE.read_text() == command_line_page.page(), anew
