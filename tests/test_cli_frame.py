"""What every command line does with its output: pipes that nobody reads, full disks, terminals with ASCII alone."""

import io
import os
import subprocess
import sys

import pytest

from abm_vision.runs.cli import Parser, guarded, say
from abm_vision.vtab.__main__ import COMMANDS

LINE = "† 87.3 ± 0.4 café \udcff"  # the last as Python holds a byte of a file's name that is no text


def once():
    print(LINE)  # held back until the end
    return 0


def said():
    say(LINE)
    say(LINE)
    return 0


def often():
    for _ in range(10_000):  # more than the buffer
        print(LINE)
    return 0


def explained():
    print(LINE)
    return Parser("abm-test").parse_args(["--help"])


def refused():
    raise ValueError("a price of 5 € is refused")


def other():
    raise BrokenPipeError("a pipe of its own")


def carried_on():
    """As a suite does with a run that fails."""
    for _ in range(2):
        try:
            say(LINE)
        except Exception:
            pass
    return 0


def answer(command, monkeypatch, out, encoding="utf-8"):
    """Exit code and messages of a command that writes to the file descriptor `out`, up to the process's end."""
    err = io.BytesIO()
    with monkeypatch.context() as patch, os.fdopen(out, "wb") as binary:
        patch.setattr(sys, "stdout", io.TextIOWrapper(binary, encoding, line_buffering=False))
        messages = io.TextIOWrapper(err, encoding, write_through=True)
        patch.setattr(sys, "stderr", messages)
        try:
            code = guarded("abm-test", command, smaller="")
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()  # as Python does at its end
    return code, err.getvalue().decode()


def unread():
    """The end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("command", [once, said, often, explained, carried_on])
def test_output_that_nobody_reads_ends_a_command_without_a_word(monkeypatch, command):
    assert answer(command, monkeypatch, unread()) == (141, "")


def test_predictions_for_head_alone(monkeypatch):
    """`predict ... | head`, of more images than a pipe holds back."""
    row = {"image": "image.png", "top": [{"class": "banded", "probability": 0.5}]}
    monkeypatch.setattr("abm_vision.images.predict.predict", lambda *_, **__: [row] * 10_000)
    monkeypatch.setattr("abm_vision.images.photos.check_readable", lambda *_: {})
    for more in ([], ["--json"]):
        words = COMMANDS["predict"].parser().parse_args(["a", __file__, "--device", "cpu", *more])
        assert answer(lambda words=words: COMMANDS["predict"].body(words), monkeypatch, unread()) == (141, "")


def test_another_broken_pipe_is_an_error(monkeypatch, tmp_path):
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    assert answer(other, monkeypatch, out) == (2, "abm-test: error: a pipe of its own\n")


def test_errors_are_shown_where_output_is_not_read(monkeypatch):
    assert answer(refused, monkeypatch, unread()) == (2, "abm-test: error: a price of 5 € is refused\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", [once, said, often])
def test_output_into_a_full_disk_is_an_error(monkeypatch, command):
    expected = (2, "abm-test: error: [Errno 28] No space left on device\n")
    assert answer(command, monkeypatch, os.open("/dev/full", os.O_WRONLY)) == expected


@pytest.mark.parametrize(
    ("encoding", "shown", "message"),
    [
        ("ascii", rb"\u2020 87.3 \xb1 0.4 caf\xe9 \udcff", r"a price of 5 \u20ac is refused"),
        ("latin-1", rb"\u2020 87.3 " + b"\xb1 0.4 caf\xe9" + rb" \udcff", r"a price of 5 \u20ac is refused"),
        ("utf-8", "† 87.3 ± 0.4 café ".encode() + rb"\udcff", "a price of 5 € is refused"),
    ],
)
def test_what_a_terminal_cannot_show_is_escaped(monkeypatch, tmp_path, encoding, shown, message):
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    assert answer(once, monkeypatch, out, encoding) == (0, "")
    assert (tmp_path / "out").read_bytes() == shown + b"\n"
    out = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    assert answer(refused, monkeypatch, out, encoding) == (2, f"abm-test: error: {message}\n")


def test_without_any_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where a shell said >&-
    assert guarded("abm-test", said, smaller="") == 0


def test_the_real_command():
    done = subprocess.run(
        [sys.executable, "-m", "abm_vision.vtab", "list"], stdout=unread(), stderr=subprocess.PIPE, check=False
    )
    assert done.returncode == 141 and b"abm-vtab" not in done.stderr and b"ipe" not in done.stderr


FORKING = """
import os, signal, sys, time
from abm_vision.runs.cli import guarded

number = signal.Signals[sys.argv[1]]
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), number))


def command():
    if os.fork() == 0:
        os._exit(0)
    time.sleep(60)
    return 0


sys.exit(guarded("abm-test", command, smaller="model"))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_workers_are_forked_is_heeded(name, code):
    """Python drops what is raised in the callbacks around a fork."""
    words = [sys.executable, "-c", FORKING, name]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    assert done.returncode == code and "Traceback" not in done.stderr
