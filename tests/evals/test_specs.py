import pytest

from regpt.errors import UsageError
from regpt.evals.specs import check_specs, parse_tasks


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("val", [("val", "")]),
        ("val, hellaswag", [("val", ""), ("hellaswag", "")]),
        ("hellaswag:a/b.jsonl,mc:c:d.jsonl", [("hellaswag", "a/b.jsonl"), ("mc", "c:d.jsonl")]),
        ("val,lm-eval:hellaswag,arc_easy", [("val", ""), ("lm-eval", "hellaswag,arc_easy")]),
        ("lm-eval:piqa", [("lm-eval", "piqa")]),
        ("core:data/evals", [("core", "data/evals")]),
        ("core:d/arc_easy,piqa,hellaswag,mc:q", [("core", "d/arc_easy,piqa"), ("hellaswag", ""), ("mc", "q")]),
    ],
)
def test_lists_of_tasks(typed, meant):
    assert [tuple(spec) for spec in parse_tasks(typed)] == meant
    assert parse_tasks(",".join(map(str, parse_tasks(typed)))) == parse_tasks(typed)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("vla", "task 'vla' is unknown .did you mean 'val'.*; choose from val "),
        ("", "task '' is unknown"),
        ("needle:lengths=32,64", "'64' is not a task; needle's numbers have / between them"),
        ("core", "task 'core' needs to know which; give core:DIR"),
        ("mc:", "task 'mc' needs to know which; give mc:FILE"),
        ("lm-eval:", "task 'lm-eval' needs to know which"),
        ("val:x", "val takes nothing after a colon"),
        ("val,hellaswag,val", "task 'val' is given twice"),
        ("core:d/arc_easy,piqq", "'piqq' is neither a kind of task nor one of CORE's tasks .did you mean 'piqa'"),
        ("core:a,val,core:b", "tasks 'core:a' and 'core:b' have one name in results"),
        ("hellaswag,hellaswag:f", "tasks 'hellaswag' and 'hellaswag:f' have one name"),
    ],
)
def test_what_is_no_task_is_refused(typed, said):
    with pytest.raises(UsageError, match=said):
        parse_tasks(typed)


def test_lists_from_a_configuration_are_checked_alike():
    assert check_specs(["hellaswag"])[0].kind == "hellaswag"
    with pytest.raises(UsageError, match="unknown"):
        check_specs(["hella"])
