"""`[train]`, `[optim]` and `[log]`: values out of range, one sentence each."""

import math

import pytest

from regpt.errors import UsageError
from regpt.train.config import LogConfig, OptimConfig, TrainConfig


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        (TrainConfig, {"steps": 0}, r"^train\.steps is 0, must be at least 1$"),
        (TrainConfig, {"batch_tokens": 0}, r"^train\.batch_tokens is 0, must be at least 1$"),
        (TrainConfig, {"micro_batch_rows": 0}, r"^train\.micro_batch_rows is 0, must be at least 1$"),
        (TrainConfig, {"grad_clip": -0.5}, r"^train\.grad_clip is -0\.5, must be 0 or more$"),
        (TrainConfig, {"grad_clip": math.nan}, r"^train\.grad_clip is nan, must be 0 or more$"),
        (OptimConfig, {"lr": -1e-3}, r"^optim\.lr is -0\.001, must be 0 or more$"),
        (OptimConfig, {"lr": math.nan}, r"^optim\.lr is nan, must be 0 or more$"),
        (OptimConfig, {"lr": math.inf}, r"^optim\.lr is inf, must be a finite number$"),
        (OptimConfig, {"eps": math.inf}, r"^optim\.eps is inf, must be a finite number$"),
        (OptimConfig, {"weight_decay": math.inf}, r"^optim\.weight_decay is inf, must be a finite number$"),
        (OptimConfig, {"min_lr_ratio": 1.5}, r"^optim\.min_lr_ratio is 1\.5, must be at most 1$"),
        (OptimConfig, {"warmup_steps": -1}, r"^optim\.warmup_steps is -1, must be 0 or more$"),
        (OptimConfig, {"decay_steps": 0}, r"^optim\.decay_steps is 0, must be at least 1$"),
        (OptimConfig, {"weight_decay": -0.1}, r"^optim\.weight_decay is -0\.1, must be 0 or more$"),
        (OptimConfig, {"beta1": 1.0}, r"^optim\.beta1 is 1\.0, must be below 1$"),
        (OptimConfig, {"beta2": -0.1}, r"^optim\.beta2 is -0\.1, must be 0 or more$"),
        (OptimConfig, {"eps": -1e-8}, r"^optim\.eps is -1e-08, must be 1\.18e-38 or more"),
        (OptimConfig, {"eps": 0.0}, r"^optim\.eps is 0\.0, must be 1\.18e-38 or more \(1e-8 is usual\)"),
        (OptimConfig, {"eps": 1e-45}, r"^optim\.eps is 1e-45, must be 1\.18e-38 or more"),
        (OptimConfig, {"eps": math.nan}, r"^optim\.eps is nan, must be 1\.18e-38 or more"),
        (LogConfig, {"every_steps": 0}, r"^log\.every_steps is 0, must be at least 1$"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(section, values: dict, sentence: str):
    with pytest.raises(UsageError, match=sentence):
        section(**values)
