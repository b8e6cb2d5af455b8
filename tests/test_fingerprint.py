"""A hash of meaning: it changes with what code does, and with nothing else."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from swconv.fingerprint import PACKAGE, closure, fingerprint

FILES = {
    "setup.py": "flags = ['-O3']\n",
    "csrc/op.cpp": '#define N 3\nint f(int a) { return a + N; }  // add\nconst char* s = "a  b";\n',
    "pack/__init__.py": "",
    "pack/entry.py": "from pack.near import f\n\n\ndef run():\n    from . import late\n    return f() + late.g()\n",
    "pack/near.py": '"""Doc."""\n\n\ndef f():\n    """Doc."""\n    return 1\n',
    "pack/late.py": "from .deep.leaf import h as g\n",
    "pack/deep/__init__.py": "X = 1\n",
    "pack/deep/leaf.py": "import json\n\n\ndef h():\n    return json.loads('2')\n",
    "pack/unused.py": "Y = 1\n",
}


@pytest.fixture
def hashed(tmp_path: Path):
    """Hash of a copy of the package in which some files hold other text."""
    copies = itertools.count()

    def after(texts: dict[str, str], csrc: bool = False) -> str:
        root = tmp_path / str(next(copies)) / "pack"  # every time another folder: a file is read once per process
        for name, text in (FILES | texts).items():
            path = root.parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return fingerprint("pack.entry", root, csrc=csrc)

    return after


@pytest.mark.parametrize(("name", "text"), [
    ("pack/near.py", '"""Other."""\n# why\n\n\ndef f():\n    """Other."""\n\n    return (1)  # one\n'),
    ("pack/deep/leaf.py", "import json\ndef h(): return json.loads('2')\n"),
    ("pack/deep/leaf.py", 'import json\n\n\ndef h():\n    "why"\n    return json.loads("""2""")\n'),
    ("pack/unused.py", "Y = 2\n"),
    ("csrc/op.cpp", "int f() { return 2; }\n"),
    ("setup.py", "flags = []\n"),
])
def test_what_means_the_same_or_is_not_used_changes_nothing(hashed, name, text):
    assert hashed({name: text}) == hashed({})


@pytest.mark.parametrize(("name", "text"), [
    ("pack/__init__.py", "Z = 1\n"),
    ("pack/near.py", "def f():\n    return 1.0\n"),
    ("pack/near.py", 'def f():\n    return "1"\n'),
    ("pack/late.py", "from .deep.leaf import h as g\nZ = 1\n"),
    ("pack/deep/__init__.py", "X = 2\n"),
    ("pack/deep/leaf.py", "import json\n\n\ndef h():\n    return json.loads('3')\n"),
])
def test_other_code_anywhere_below_changes_the_hash(hashed, name, text):
    assert hashed({name: text}) != hashed({})


@pytest.mark.parametrize(("name", "text"), [
    ("csrc/op.cpp", '// adds\n#define N 3\nint f(int a)\n{\n  return a+N; /* add */\n}\nconst char* s = "a  b";\n'),
    ("setup.py", '"""Builds."""\nflags = ["-O3"]\n'),
])
def test_csrc_comments_and_blanks_mean_nothing(hashed, name, text):
    assert hashed({name: text}, csrc=True) == hashed({}, csrc=True)


@pytest.mark.parametrize(("name", "text"), [
    ("csrc/op.cpp", FILES["csrc/op.cpp"].replace("N 3", "N 4")),
    ("csrc/op.cpp", FILES["csrc/op.cpp"].replace("a  b", "a b")),
    ("csrc/op.cpp", FILES["csrc/op.cpp"].replace("a + N", "a + +N")),
    ("csrc/op.cpp", FILES["csrc/op.cpp"].replace("3\nint", "3 int")),
    ("csrc/other.h", "#pragma once\n"),
    ("setup.py", "flags = ['-O3', '-ffast-math']\n"),
])
def test_other_csrc_or_flags_change_the_hash(hashed, name, text):
    assert hashed({name: text}, csrc=True) != hashed({}, csrc=True)


def test_a_comment_sign_in_a_string_starts_no_comment(hashed):
    texts = [f'const char* s = "//{end}"; /* {end} */\n' for end in ("a", "b")]
    assert len({hashed({"csrc/op.cpp": text}, csrc=True) for text in texts}) == 2


def test_a_module_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"swconv\.training\.lop"):
        fingerprint("swconv.training.lop")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("import pack.gone\n")
    with pytest.raises(ModuleNotFoundError, match=r"pack imports pack\.gone"):
        fingerprint("pack", tmp_path / "pack")


def test_csrc_without_sources_is_refused(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"C\+\+ sources"):
        fingerprint("pack", tmp_path / "pack", csrc=True)


def test_training_depends_on_operator_models_and_sparsity_but_not_on_reports():
    names = closure("swconv.training.loop").keys()
    assert {"swconv.ops.strips", "swconv.models.sw", "swconv.sparsity", "swconv.training.data"} <= names
    assert not [name for name in names if name.startswith(("swconv.reporting", "swconv.params", "swconv.training.tracking"))]


def test_however_many_stages_are_hashed_every_file_is_read_once():
    code = (
        "import collections, pathlib; read, counted = pathlib.Path.read_text, collections.Counter()\n"
        "def read_text(path, *args, **kwargs):\n"
        "    counted[path] += 1\n"
        "    return read(path, *args, **kwargs)\n"
        "pathlib.Path.read_text = read_text\n"
        "from swconv.fingerprint import fingerprint\n"
        "for name in ('training.loop', 'training.evaluation', 'training.tracking', 'reporting.report', 'build'):\n"
        "    fingerprint(f'swconv.{name}', csrc=True)\n"
        "print(len(counted), max(counted.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    files, most = map(int, done.stdout.split())
    assert files > 40
    assert most == 1
