"""`dalle-fast verify`: its figures at a smaller size, and that what goes wrong is counted, never passed over."""

import contextlib
import dataclasses
import fcntl
import importlib
import json
import multiprocessing
import os
import pathlib
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch

from dalle_fast import cli, outputs, provenance, testing
from dalle_fast.nn import functional as F
from dalle_fast.nn import transformer
from dalle_fast.verify import (
    badinput,
    causal,
    checkout,
    decode,
    error,
    large,
    mutants,
    native,
    repeat,
    runner,
    sampler,
    static,
)
from dalle_fast.verify.figures import FIGURES, Figure, NotRun

# Of each figure as many cases, spread over all of them, as take a few seconds. The others have test files of their own,
# which they run.
CASES = {
    "diff": 80,
    "causal": 60,
    "decode": 14,
    "gradcheck": 16,
    "badinput": 500,
    "repeat": 60,
    "guard": 60,
    "large": 6,
    "noise": 3,
}


@pytest.mark.parametrize("name", CASES)
def test_cases_pass(name):
    figure, ran, reasons = FIGURES[name], 0, []
    step = -(-figure.total // CASES[name])
    for number in range(0, figure.total, step | 1):  # odd: what cases are follows from their last bits
        try:
            figure.case(number)
            ran += 1
        except NotRun as reason:
            reasons.append(str(reason))
        except Exception as failure:
            raise AssertionError(f"{name}, case {number}: {failure}") from failure
    if not ran:
        pytest.skip(reasons[0])


def with_threads(function):
    """The function's results, wrong in their last element where several threads compute them."""

    def wrong(*args, **keywords):
        found = function(*args, **keywords)
        if torch.get_num_threads() > 1:
            for x in found if isinstance(found, tuple) else (found,):
                x.detach().view(-1)[-1:] += 1
        return found

    return wrong


def changed(**arguments):
    """A way to lose arguments: each becomes what its function makes of all of them."""
    return lambda function: (
        lambda *args, **given: function(
            *args, **{k: arguments[k](given) if k in arguments else x for k, x in given.items()}
        )
    )


def first_lengths(given):
    lengths = given["text_lengths"]
    return None if lengths is None else lengths[:1].expand(len(lengths))


def without_range(given):
    return (0, given["code_range"][1]) if given["code_range"] else None


def operand(number, value):
    return lambda function: lambda *args: function(*(value(x) if n == number else x for n, x in enumerate(args)))


def bound_of_scores(function):
    def wrong(*args, **keywords):
        out, lse = function(*args, **keywords)
        return out * ((lse > -80) | (lse == -torch.inf))[..., None], lse

    return wrong


@pytest.mark.parametrize(
    ("name", "case", "where", "function", "fault"),
    [
        ("diff", 117, F, "sparse_attention", with_threads),
        ("diff", 213, F, "sparse_attention", bound_of_scores),
        ("diff", 11, F, "codebook_cross_entropy", changed(ignore_index=lambda given: -100)),
        ("diff", 19, F, "codebook_argmax", changed(code_range=without_range)),
        ("diff", 19, F, "codebook_sample", changed(code_range=without_range)),
        ("repeat", 4, F, "codebook_sample", with_threads),
        ("decode", 0, F, "sparse_attention_decode", changed(text_lengths=first_lengths)),
        ("decode", 0, transformer, "blocks_step", operand(5, lambda lengths: None)),
        ("decode", 0, transformer, "blocks_step", operand(2, lambda epsilons: [0.0] * len(epsilons))),
    ],
)
def test_a_figure_sees_what_only_some_calls_show(monkeypatch, name, case, where, function, fault):
    """Threads, large scores, ignored targets, ranges of codes, texts of unequal length, the native step of all blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the figure's worker
    try:
        FIGURES[name].case(case)
        monkeypatch.setattr(where, function, fault(getattr(where, function)))
        with pytest.raises((AssertionError, ValueError)):
            FIGURES[name].case(case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("first", "second"), [(0.0, -0.0), (0.0, torch.nan), (torch.finfo().max, torch.inf)])
def test_repeats_that_differ_in_a_bit_are_seen(first, second):
    one, other = (torch.tensor([1.0, x, torch.nan, -torch.inf]) for x in (first, second))
    repeat._assert_equal("again", [one, None, one[:0].half()], [one.clone(), None, one[:0].half()])
    with pytest.raises(AssertionError, match="again: result 0 differs"):
        repeat._assert_equal("again", [one], [other])


@pytest.mark.parametrize(
    ("way", "message", "named"),
    [
        ("a number", "keyword must be a tensor", False),
        ("a number", "query must be a tensor", False),
        ("a number", "key must be a tensor", True),
        ("a longer first dimension", "query must have key's shape", True),
        ("a longer first dimension", "keys must have as many", False),
    ],
)
def test_an_error_must_name_the_argument(monkeypatch, way, message, named):
    def refuse(query, key):
        if key is not good:
            raise ValueError(message)

    good = torch.zeros(2, 2)
    spoils = {"key": {way: {**badinput.NOT_TENSORS, **badinput.SHAPES}[way]}}
    monkeypatch.setattr(badinput, "CALLS", {"f": lambda: badinput.Call(refuse, {"query": 1, "key": good}, spoils)})
    monkeypatch.setattr(badinput, "cases", lambda: [("f", "key", way)])
    if named:
        badinput.case(0, "cpu")
    else:
        with pytest.raises(AssertionError, match="f, key .*: the error does not name it"):
            badinput.case(0, "cpu")


def test_eager_torch_is_not_blamed_for_other_noise(monkeypatch):
    """In 16 bits it draws other noise than this package: one that is exact for its own errs by the rounding of results."""

    def exact(hidden, *rest, tau, noise):
        return [x.to(hidden.dtype) for x in testing.codebook_oracle(hidden, *rest, tau, noise)[:2]]

    monkeypatch.setattr(error, "eager_codebook", exact)
    ours, eager = error._codebook_errors(0, 1.0, torch.bfloat16, "cpu", "reference")["embedding"]
    assert eager < 1.5 * ours


def test_every_figure_has_as_many_cases_as_it_says():
    listed = {
        "badinput": badinput.cases(),
        "causal": causal.POSITIONS,
        "decode": decode.CASES,
        "error": error.CASES,
        "large": large.CASES,
        "mutants": mutants.MUTANTS,
        "native": native.CASES,
        "sampler": sampler.CASES,
        "static": static.CASES,
    }
    assert {name: len(cases) for name, cases in listed.items()} == {name: FIGURES[name].total for name in listed}
    for name in FIGURES:
        assert importlib.import_module(f"dalle_fast.verify.{name}").case


def test_every_fault_can_still_be_seeded():
    for mutant in mutants.MUTANTS:
        text = (provenance.ROOT / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1 and mutant.new != mutant.old, mutant.name


@pytest.fixture
def seeded(monkeypatch, tmp_path):
    """seeded(old, new, test) tries one mutant of a file whose text is `old`, with this text of a test of it."""

    def seeded(old, new, test):
        copies = [tempfile.TemporaryDirectory(dir=tmp_path) for _ in range(2)]
        for copy in copies:
            pathlib.Path(copy.name, "thing.py").write_text(old)
            pathlib.Path(copy.name, "test_thing.py").write_text(f"import os, thing\ndef test_it():\n    {test}\n")
        monkeypatch.setattr(mutants, "_copies", lambda: copies)
        monkeypatch.setattr(mutants, "_build", lambda folder: None)
        monkeypatch.setattr(mutants, "MUTANTS", [mutants.Mutant("a fault", "thing.py", old, new, ("test_thing.py",))])
        mutants.case(0, "cpu")

    return seeded


def test_a_fault_is_caught_only_by_a_test_that_passes_without_it(seeded):
    seeded("a = 1", "a = 2", "assert thing.a == 1")
    seeded("a = 1", "a = 2", "thing.a == 1 or os.abort()")  # a crash is as good
    with pytest.raises(AssertionError, match="no test of test_thing.py fails, 1 pass"):
        seeded("a = 1", "a = 2", "pass")
    for test in ("assert False, 'the disk is full'", "os.abort()"):
        with pytest.raises(
            RuntimeError, match="test_thing.py.* fails without the fault too: .*(disk is full|signal 6)"
        ):
            seeded("a = 1", "a = 1  # the same", test)


def test_a_run_of_tests_that_was_killed_catches_no_fault(seeded):
    with pytest.raises(NotRun, match="ended by SIGKILL, as the system does when memory is short"):
        seeded("a = 1", "a = 2", "os.kill(os.getpid(), 9)")


def test_what_a_machine_lacks_is_no_failure(monkeypatch, tmp_path):
    """As after a plain `pip install -e .`, which brings neither pytest nor what builds."""
    monkeypatch.setattr(checkout, "find_spec", lambda name: None)
    with pytest.raises(NotRun, match="it needs pytest"):
        native.case(native.CASES.index("cuda on the host"), "cpu")
    monkeypatch.setattr(checkout.shutil, "which", lambda name: None)
    with pytest.raises(NotRun, match=r"the build needs setuptools .* and ninja \(pip install setuptools .* ninja\)"):
        checkout.rebuild(tmp_path)
    monkeypatch.setattr(checkout, "find_spec", lambda name: name)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NotRun, match="there is no C.. compiler"):
        checkout.rebuild(tmp_path)


# -- the runner --------------------------------------------------------------------------------------------------------


TRIAL = """
import fcntl, os, pathlib, signal, subprocess, sys, tempfile, time

from dalle_fast.verify.figures import NotRun


def case(number, device):
    what = os.environ["TRIAL"].split(",")[number]
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(60)
    if what == "busy":  # at first
        first = pathlib.Path(os.environ["TRIAL_FOLDER"], f"case-{number}")
        if not first.exists():
            first.touch()
            time.sleep(60)
    if what == "hold":  # a lock, that a process which it starts has too
        with open(os.path.join(os.environ["TRIAL_FOLDER"], "lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            subprocess.run(["sleep", "60"], pass_fds=[file.fileno()])
    if what == "litter":
        tempfile.mkstemp()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leave":
        sys.exit(3)
    if what == "wrong":
        raise AssertionError("1 is not 2")
    if what == "not run":
        raise NotRun("no such machine")
    print("what a case prints is no answer")
    return {"size": float(number), "pieces": 2}
"""  # the figure's module in the worker


@pytest.fixture
def verify(monkeypatch, tmp_path):
    """verify(cases, **options) -> (exit status, result of the one figure that there is, its file)"""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "trial.py").write_text(TRIAL)
    # The child imports the figure's module by its name, and the list of figures that has it. Of torch it is given
    # nothing but what it asks for, as the real one takes seconds to import and these cases do not need it.
    (folder / "sitecustomize.py").write_text(
        "import sys, types\n"
        "sys.modules['torch'] = types.SimpleNamespace(set_num_threads=lambda count: None)\n"
        "from dalle_fast.verify import figures\n"
        "figures.FIGURES['trial'] = figures.Figure('trial', 'trials', 9)\n"
        "import trial\n"
        "sys.modules['dalle_fast.verify.trial'] = trial\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(runner.__file__)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.path.dirname(root)]))
    monkeypatch.setenv("TRIAL_FOLDER", str(folder))

    def verify(cases, *, seconds=20, about=0, **options):
        monkeypatch.setenv("TRIAL", ",".join(cases))
        monkeypatch.setattr(runner, "FIGURES", {"trial": Figure("trial", "trials", len(cases), seconds, about)})
        out = tmp_path / "evidence.json"
        status = runner.verify([], out, **{"gpu": False, "budget": 60, "restart": False, **options})
        return status, json.loads(out.read_text())["figures"]["trial"], out

    return verify


def test_what_goes_wrong_is_counted(verify, capsys):
    status, result, _ = verify(["fine", "crash", "wrong", "hang", "leave", "fine"], seconds=3)
    assert status == 1 and result["status"] == "fail"
    assert result["done"] == 6 and result["num_failures"] == 4 and result["worst"] == {"size": 5.0}
    assert result["counts"] == {"pieces": 4}
    whats = {failure["case"]: failure["what"] for failure in result["failures"]}
    assert "signal 11" in whats[1] and "1 is not 2" in whats[2] and "no answer within 3 s, twice" in whats[3]
    assert "status 3" in whats[4]
    assert "0 pass, 1 fail, 0 not run" in capsys.readouterr().out


def test_a_busy_machine_is_no_hang(verify, capsys):
    status, result, _ = verify(["fine", "busy", "fine"], seconds=3)
    assert status == 0 and result["status"] == "pass" and result["done"] == 3 and result["again"] == [1]
    assert "no answer in time at first: 1" in capsys.readouterr().out


def test_time_in_which_the_machine_sleeps_is_no_hang(monkeypatch):
    lines, clock = queue.Queue(), iter(range(0, 10**6, 1000))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))  # a thousand seconds pass between two looks
    threading.Timer(0.7, lines.put, ["answer"]).start()
    assert runner._next(lines, 20, lambda: False) == "answer"


def test_the_end_of_the_budget_is_no_failure(verify):
    """Neither in the midst of a case, nor before one that would take longer than what is left."""
    status, result, _ = verify(["fine", "hang"], budget=3)
    assert status == 0 and result["status"] == "not run" and result["num_failures"] == 0
    assert result["reason"] == f"the budget ended after {result['done']} of 2"
    start = time.monotonic()
    _, result, _ = verify(["fine"], about=100, budget=50, restart=True)
    assert result["done"] == 0 and result["reason"] == "the budget ended after 0 of 1, of about 100 s each"
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_keeps_what_was_found(verify, monkeypatch, tmp_path, number):
    """As do a `timeout` and a closed terminal."""
    finish = runner._Run._add

    def add(*arguments):
        finish(*arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(runner._Run, "_add", add)

    def unheard(*_):
        raise RuntimeError("the run did not listen")

    # A shell's background processes ignore SIGINT, others end those that run tests.
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else unheard)
    try:
        with pytest.raises(KeyboardInterrupt):  # `dalle_fast.cli` says so in one line
            verify(["fine", "hang"])
        assert number == signal.SIGINT or signal.getsignal(number) is unheard  # as it was
    finally:
        signal.signal(number, before)
    assert json.loads((tmp_path / "evidence.json").read_text())["figures"]["trial"]["done"] == 1


def test_nothing_outlives_a_killed_run(verify, tmp_path):
    run = multiprocessing.get_context("fork").Process(target=verify, args=(["fine", "hold"],))
    run.start()
    lock = tmp_path / "site" / "lock"
    wait_until(lambda: lock.exists() and not _can_lock(lock))
    run.kill()
    run.join()
    wait_until(lambda: _can_lock(lock))


def _can_lock(path):
    with open(path) as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def wait_until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_was_killed_leaves_no_files(verify, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read it again
    assert verify(["litter", "fine"])[1]["num_failures"] == 1
    assert list(scratch.iterdir()) == []


def test_not_run_is_not_passed(verify, capsys):
    status, result, _ = verify(["fine", "not run"])
    assert status == 0 and result["status"] == "not run" and result["reason"] == "no such machine"
    assert "0 pass, 0 fail, 1 not run" in capsys.readouterr().out


def test_the_reason_is_that_of_the_last_judgement(verify):
    """Neither that the budget had ended, before all was tried, nor any where something failed."""
    _, result, out = verify(["not run", "fine"])
    assert result["status"] == "not run" and result["reason"] == "no such machine"
    report = json.loads(out.read_text())
    report["figures"]["trial"] |= {"done": 1, "reason": "the budget ended after 1 of 2"}
    out.write_text(json.dumps(report))
    status, result, _ = verify(["not run", "wrong"])
    assert status == 1 and result["status"] == "fail" and "reason" not in result


def test_what_was_lacking_is_looked_for_again(verify):
    """As after `pip install` of what a reason names. What was tried beside it is kept."""
    assert verify(["not run", "not run"])[1]["status"] == "not run"
    _, result, _ = verify(["fine", "not run"])
    assert result["status"] == "not run" and result["done"] == 2 and result["skipped"] == 1
    _, again, _ = verify(["wrong", "not run"])
    assert again | {"seconds": result["seconds"]} == result
    _, result, _ = verify(["wrong", "fine"])
    assert result["status"] == "pass" and result["done"] == 2 and result["skipped"] == 0 and result["lacking"] == []
    assert result["counts"] == {"pieces": 4}


def test_goes_on_where_it_stopped(verify, capsys):
    cases = ["fine"] * 4
    status, result, out = verify(cases, budget=1e-9)
    assert status == 0 and result["status"] == "not run" and "budget ended after 0 of 4" in result["reason"]
    report = json.loads(out.read_text())
    report["figures"]["trial"]["done"] = 3  # as if it had been interrupted there
    out.write_text(json.dumps(report))
    status, result, _ = verify(["wrong"] * 3 + ["fine"])
    assert status == 0 and result["status"] == "pass" and result["done"] == 4
    report["commit"] = "another"
    out.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="results of another commit: name another file, or --restart"):
        verify(cases)
    assert verify(cases, restart=True)[1]["status"] == "pass"


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"figures": 3}', b"\x89PNG"])
def test_another_file_is_not_overwritten(verify, tmp_path, text):
    (tmp_path / "evidence.json").write_bytes(text)
    with pytest.raises(runner.VerifyError, match="holds something else than results of verify"):
        verify(["fine"])
    assert (tmp_path / "evidence.json").read_bytes() == text


def test_the_command_refuses_what_is_wrong(tmp_path, capsys):
    for arguments in (
        ["verify"],
        ["verify", "--out", "x", "--budget", "-1"],
        ["verify", "--out", "x", "--budget", "a"],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2
    assert "--out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="NAME must be one of diff, .*, got nothing"):
        runner.verify(["nothing"], tmp_path / "x.json", gpu=False, budget=1, restart=False)
    for out in (tmp_path, tmp_path / "missing" / "x.json", pathlib.Path("/proc/x.json"), pathlib.Path(os.devnull)):
        with pytest.raises(ValueError, match="--out must name a writable file in a folder that exists, got "):
            runner.verify(["diff"], out, gpu=False, budget=1, restart=False)


def test_whether_a_file_can_be_written_is_asked_without_writing(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.write_text("kept")
    assert outputs.can_write(there) and outputs.can_write(tmp_path / "new")
    assert list(tmp_path.iterdir()) == [there] and there.read_text() == "kept"
    monkeypatch.setattr(os, "access", lambda path, mode: path != there)  # root may write whatever its mode
    assert outputs.can_write(tmp_path / "new") and not outputs.can_write(there)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [name for name, figure in FIGURES.items() if figure.gpu_total])
def test_without_a_gpu_its_figures_are_not_run(name):
    with pytest.raises(NotRun, match="torch finds no CUDA device here"):
        dataclasses.replace(FIGURES[name], device="cuda").case(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_sanitizer_that_saw_no_kernel_has_not_passed(tmp_path):
    """benchmarks/gpu_run.sh where compute-sanitizer only runs what it is given: cases that find no GPU are no evidence."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\nexec "$@"\n')
    fake.chmod(0o755)
    python = tmp_path / "python"  # which says that there is a GPU, and xdist
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"STEPS": "^(memcheck|racecheck)$", "PYTHONPATH": str(provenance.ROOT)}
    command = ["bash", provenance.ROOT / "benchmarks" / "gpu_run.sh", "results"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    for name, cases in (("memcheck", 16), ("racecheck", 8)):
        assert f"{name}" in ran.stdout and "ended with 1" in ran.stdout
        log = (tmp_path / "results" / f"{name}.log").read_text()
        assert log.count("torch finds no CUDA device here") == cases


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_of_its_run_is_ok(tmp_path):
    """Figures that are not run, skipped tests and benchmarks of a CPU all end with 0."""
    environment = {**os.environ, "PYTHON": sys.executable, "STEPS": "^verify$", "PYTHONPATH": str(provenance.ROOT)}
    command = ["bash", provenance.ROOT / "benchmarks" / "gpu_run.sh", tmp_path]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "") and "torch finds no GPU here" in ran.stderr


# -- which code it was -------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A small repository in place of this one: a function that runs git in it, and its folder."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    root = tmp_path / "checkout"
    (root / "csrc").mkdir(parents=True)
    (root / "benchmarks" / "results").mkdir(parents=True)
    for name in ("csrc/a.cpp", "benchmarks/results/a.json", "README.md"):
        (root / name).write_text("1\n")

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=root, capture_output=True, check=True, text=True
        ).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "ROOT", root)
    return git, root


def test_two_changed_trees_are_two(repository):
    git, root = repository
    commit = git("rev-parse", "HEAD").strip()
    assert provenance.describe_commit() == commit
    (root / "benchmarks" / "results" / "a.json").write_text("2\n")  # what a run itself writes
    (root / "README.md").write_text("2\n")
    assert provenance.describe_commit() == commit
    (root / "csrc" / "a.cpp").write_text("2\n")
    seen = [provenance.describe_commit()]
    (root / "csrc" / "a.cpp").write_text("3\n")
    seen.append(provenance.describe_commit())
    (root / "csrc" / "ünder.cpp").write_text("new: CMake would find it\n")
    seen.append(provenance.describe_commit())
    (root / "csrc" / "a.cpp").unlink()
    seen.append(provenance.describe_commit())
    assert len(set(seen)) == 4 and seen[-1] == provenance.describe_commit()
    for text in seen:
        assert re.fullmatch(rf"{commit}\+changes-[0-9a-f]{{8}}", text)


def test_a_repository_that_holds_the_package_is_not_its_own(repository, monkeypatch):
    """As one with a virtual environment in it, where the package is installed."""
    monkeypatch.setattr(provenance, "ROOT", repository[1] / "csrc")
    assert provenance.describe_commit() is None
    monkeypatch.setattr(provenance, "ROOT", repository[1].parent)
    assert provenance.describe_commit() is None
