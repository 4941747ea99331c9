"""`regpt train --data …`: one folder, or several with their weights."""

import pytest

from regpt.cli.train import chosen_data
from regpt.data.config import DataConfig
from regpt.errors import UsageError

RECIPE = DataConfig(seq_len=7)


def test_one_folder_replaces_whatever_the_file_names():
    assert chosen_data(RECIPE, ("web",)) == DataConfig(path="web", seq_len=7)
    assert chosen_data(DataConfig(mixture={"a": 1.0}), ("web",)) == DataConfig(path="web")


def test_folders_with_weights_are_a_mixture():
    chosen = chosen_data(DataConfig(path="old"), ("web=0.7", "a=b=3"))
    assert chosen == DataConfig(mixture={"web": 0.7, "a=b": 3.0})


def test_the_last_of_several_folders_without_weights_counts_and_that_is_said(capsys):
    assert chosen_data(RECIPE, ("web", "my code")).path == "my code"
    said = "--data my code alone is read, it replaces web; a mixture has weights: --data web=1 --data 'my code=1'"
    assert said in capsys.readouterr().err
    chosen_data(RECIPE, ("web",))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rank", "nproc", "said"), [(None, 2, 1), ("0", 2, 0), ("1", 2, 0), (None, None, 1), ("0", None, 1), ("1", None, 0)]
)
def test_one_process_of_all_says_that_a_folder_is_replaced(monkeypatch, capsys, rank, nproc, said):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    chosen_data(RECIPE, ("web", "code"), nproc)
    assert capsys.readouterr().err.count("code alone is read") == said


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    (tmp_path / "a=1").mkdir()
    assert chosen_data(RECIPE, (str(tmp_path / "a=1"),)).path == str(tmp_path / "a=1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("web=0.7", "code"), "--data 'code' has no weight; write each of several folders as DIR=WEIGHT"),
        (("web=much",), "--data 'web=much' has no weight; write each of several folders as DIR=WEIGHT"),
        (("web=1", "web=2"), "--data names a folder twice (web=1 web=2); add up its weights"),
        (("web=0", "code=1"), "data.mixture gives 'web' the weight 0.0, must be a number above 0"),
    ],
)
def test_a_wrong_mixture_is_one_sentence(given, said):
    with pytest.raises(UsageError) as error:
        chosen_data(RECIPE, given)
    assert str(error.value) == said
