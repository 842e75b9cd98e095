"""What is shown: lines where there is no terminal, bars where there is one, tables."""

import pytest

from jaxadv.cli import progress as shown
from jaxadv.cli.progress import Progress, clock, mute, note, say, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-3, "0s"), (59.4, "59s"), (60, "1m00s"), (200, "3m20s"), (3599.6, "1h00m"), (7500, "2h05m")],
)
def test_the_clock(seconds, text):
    assert clock(seconds) == text


def test_plain_lines_come_at_the_start_at_the_end_and_now_and_then(capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    with Progress(terminal=False, every=5) as progress:
        for done in range(0, 101, 10):
            progress(done, 100, "work", f"at {done}")
            now[0] += 2
    out, err = capfd.readouterr()
    assert not out
    assert err.split("\n")[:-1] == [
        "work: 0/100; at 0",
        "work: 30/100, 14s left; at 30",  # 30 in 6 s: 70 more in 14 s
        "work: 60/100, 8s left; at 60",
        "work: 90/100, 2s left; at 90",
        "work: 100/100, 20s; at 100",
    ]


def test_the_end_is_told_once(capfd):
    with Progress(terminal=False) as progress:
        progress(0, 4, "a")
        for _ in range(3):
            progress(4, 4, "a")
        progress(2, 2, "b")
    assert capfd.readouterr().err.split("\n") == ["a: 0/4", "a: 4/4, 0s", "b: 2/2, 0s", ""]


def test_a_terminal_gets_a_bar_for_each_stage(capfd, monkeypatch):
    with Progress(terminal=True) as progress:
        assert progress.bars is not None
        progress(3, 10, "train", "loss 1.0")
        progress(10, 10, "train", "loss 0.5")
        progress(1, 2, "attack")
        tasks = {t.description: (t.completed, t.total, t.fields["words"]) for t in progress.bars.tasks}
    assert tasks == {"train": (10, 10, "loss 0.5"), "attack": (1, 2, "")}


def test_results_go_to_standard_output_and_remarks_to_standard_error(capfd):
    say("result")
    note("remark")
    assert capfd.readouterr() == ("result\n", "remark\n")


def test_tables_show_every_cell_and_no_markup_is_read(capfd):
    table("title", ("name", ">n"), [("[b]x[/b]", 1), ("long " * 20, 22)])
    out, err = capfd.readouterr()
    assert not err and "title" in out and "[b]x[/b]" in out and ("long " * 20).strip() in out
    assert any(line.rstrip(" │").endswith(" 1") for line in out.split("\n"))


def test_all_processes_but_the_first_say_nothing(capsys):
    mute(True)
    try:
        say("a result")
        note("a remark")
        table("a table", ("name",), [("row",)])
        with Progress(terminal=False) as bar:
            bar(1, 2, "stage")
    finally:
        mute(False)
    assert capsys.readouterr() == ("", "")
    say("a result")
    assert capsys.readouterr().out == "a result\n"
