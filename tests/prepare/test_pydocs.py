"""The documentation of the running Python, read without importing it."""

import subprocess
import sys

import pytest

from regpt.errors import UserError
from regpt.prepare.named import python_docs
from regpt.prepare.pydocs import pydocs

LIBRARY = {
    "pydoc_data/topics.py": "topics = {'b': 'Topic B\\n\\n', 'a': '\\nTopic A'}\nraise SystemExit\n",
    "shelf/__init__.py": '"""A shelf."""\nraise SystemExit\n',
    "shelf/box.py": (
        '"""Boxes."""\nclass Box(Base, list):\n    """A box.\n\n    Of wood.\n    """\n'
        '    def open(self, key: int = 3, *rest) -> str:\n        """Open it."""\n    def silent(self): ...\n'
        'async def wait(): "Wait."\n'
    ),
    "test/test_x.py": '"""Not documentation."""\n',
    "site-packages/other.py": '"""Not the library."""\n',
    "broken.py": "print 'Python 2'\n",
    "plain.py": "x = 1\n",
    "escape.py": "def f():\n    '''A \\d digit.'''\n",
}


@pytest.fixture
def library(tmp_path):
    for name, source in LIBRARY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    return tmp_path


def test_topics_come_first_then_modules_with_signatures(library):
    assert list(pydocs(library)) == [
        "Topic A\n",
        "Topic B\n",
        "escape\n\ndef f():\n\nA \\d digit.\n",
        "shelf\n\nA shelf.\n",
        "shelf.box\n\nBoxes.\n\nclass Box(Base, list):\n\nA box.\n\nOf wood.\n\n"
        "def Box.open(self, key: int=3, *rest):\n\nOpen it.\n\nasync def wait():\n\nWait.\n",
    ]


def test_the_running_pythons_library_is_megabytes_of_text():
    texts = python_docs().texts
    assert 1_500_000 < sum(len(text.encode()) for text in texts) < 6_000_000
    assert any(text.startswith("textwrap\n\nText wrapping and filling.") for text in texts)
    assert any("The \"with\" statement" in text for text in texts)  # fmt: skip
    assert len(set(texts)) > 400


def test_no_module_is_imported_by_reading_it():
    code = "import sys; from regpt.prepare.pydocs import pydocs; assert len(list(pydocs())) > 100; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pydoc_data.topics", "turtle", "this", "antigravity", "xmlrpc.client"} & set(done.stdout.split())


def test_a_python_without_sources_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"pydocs needs the sources .* holds none, give files instead"):
        list(pydocs(tmp_path))
