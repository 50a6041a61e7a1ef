"""The progress bar that the tools share."""

from nsa.tools.common.progress import Bar


def test_a_bar_on_stderr(capsys):
    with Bar(3, drawn=True) as bar:
        bar.show(description="[not markup]")
        bar.step()
        bar.stop()
        print("a table")
        bar.start()
        bar.step()
    printed = capsys.readouterr()
    assert printed.out == "a table\n"
    assert "[not markup]" in printed.err
    assert "2/3" in printed.err


def test_nothing_is_drawn_where_there_is_no_terminal(capsys):
    with Bar(3, completed=1) as bar:
        assert not bar.drawn
        bar.step()
        bar.line("[a line]")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "[a line]\n")
