"""Rows of a batch of conversations as they are trained on: which tokens are context, which are targets."""

from regpt.config import RunConfig
from regpt.console.drawing import print_parts
from regpt.console.lines import print_line
from regpt.data.masked import masked_rows
from regpt.errors import UsageError
from regpt.runs.build import open_shards
from regpt.runs.finetune import training_rows


def look(config: RunConfig, count: int, step: int = 1) -> None:
    """Print `count` rows of the batch of update `step`, and what share of it is trained on.

    Raises:
        UsageError: a step that the run does not have.
    """
    if step > config.train.steps:
        raise UsageError(f"--step is {step}, must be from 1 to the {config.train.steps} of the run")
    rows, tokenizer = training_rows(config), open_shards(config).tokenizer
    batch_rows = config.train.batch_tokens // config.data.seq_len
    whole = masked_rows(rows, (step - 1) * batch_rows, batch_rows, tokenizer)
    for row in whole[:count]:
        print_line(
            f"row {row.number:,}: {len(row.conversations)} conversations, {row.trained:,} of {row.tokens:,} tokens are "
            f"trained on, {row.padding:,} of padding"
        )
        for conversation in row.conversations:
            print_parts(conversation)
    trained, tokens = sum(row.trained for row in whole), sum(row.tokens for row in whole)
    print_line(
        f"step {step:,}, {len(whole):,} rows: {trained:,} of {tokens:,} tokens are trained on ({trained / tokens:.0%})"
    )
    print_line(f"all of the run: {rows.sentence()}")
