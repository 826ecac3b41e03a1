"""The parser: no abbreviations, and --help in groups."""

import pytest

from synco.errors import UserError
from synco.parser import GROUPS, Parser


def test_it_knows_no_abbreviations():
    parser = Parser("")
    parser.add_argument("--batch-size")
    with pytest.raises(UserError, match="unrecognized arguments: --batch 3"):
        parser.parse_args(["--batch", "3"])


def test_groups_and_the_flags_of_a_normal_run():
    """Whatever the order in which they are declared: a normal run's as listed, then the groups in their own order."""
    parser = Parser("What it does.", normal="data -b --most")
    parser.prog = "x.py"
    with parser.group("processes"):
        parser.free("--rank", help="its rank")
        either = parser.add_mutually_exclusive_group()
        parser.schedule("--most", group=either, help="the most")
        parser.schedule("--least", group=either, help="the least")
        with parser.group("speed"):
            parser.identity("--fast", action="store_true", help="be fast")
        parser.free("--last", help="the last")
    parser.free("-b", "--batch", type=int, default=3, help="size")
    parser.free("data", metavar="DATA", help="images")
    assert parser.kinds["most"] == "schedule" and parser.kinds["fast"] == "identity"
    text = parser.format_help()
    assert text.startswith("usage: x.py [flags] DATA\n\nWhat it does.\n\na normal run:\n")
    words = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert words == ["DATA", "-b,", "--most", "-h,", "--fast", "--rank", "--least", "--last"]
    titles = [line for line in text.splitlines() if line.endswith(":")]
    assert titles == ["a normal run:", "speed:", "processes:"]
    with pytest.raises(UserError, match="--least: not allowed with argument --most"):
        parser.parse_args(["--most", "1", "--least", "1", "D"])


def test_an_installed_command_gives_its_own_name():
    parser = Parser("Try\n\n  python main_synco.py FOLDER")
    for prog, command in (("main_synco.py", "python main_synco.py"), ("synco-pretrain", "synco-pretrain")):
        parser.prog = prog
        assert f"\n  {command} FOLDER\n" in parser.format_help()


def test_what_is_required_stands_in_the_usage():
    parser = Parser("")
    parser.prog = "x.py"
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    parser.add_argument("runs", nargs="*", metavar="RUN")
    text = parser.format_help()
    assert text.startswith("usage: x.py [flags] -o FILE [RUN ...]\n") and "\noptions:\n" in text


def test_a_group_that_is_none():
    with pytest.raises(ValueError, match=f"'sped' is none of {', '.join(GROUPS)}"), Parser("").group("sped"):
        pass
