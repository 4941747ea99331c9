"""Rewind a running run to its last checkpoint."""

from pathlib import Path

from regpt.checkpoint.load import checkpoints
from regpt.checkpoint.state import restore_generators
from regpt.errors import UserError
from regpt.model.weights import load_weights
from regpt.runs.begin import choose_checkpoint
from regpt.train.average import Average
from regpt.train.optim import load_optimizer
from regpt.train.trainer import Trainer


def go_back(run: Path, trainer: Trainer, average: Average | None) -> None:
    """Give `trainer` the state of the newest valid checkpoint of `run`; its next batch is the one after the present.
    So with the `average` of its weights, where one is kept.

    All batches from the checkpoint on are left out, the present one too: PaLM's remedy (Chowdhery et al. 2022, section
    5.1), whose authors found that neither the state nor the data alone made a spike.

    Raises:
        UserError: there is no checkpoint.
    """
    mesh, failed_at, following = trainer.mesh, trainer.step, trainer.data_step + 1
    if mesh.any(mesh.is_main and not checkpoints(run)):
        raise UserError(
            f"step {failed_at + 1} is not finite and run {str(run)!r} has no checkpoint to go back to; set a smaller "
            "checkpoint.every_steps, or train.on_non_finite skip"
        )
    checkpoint, _ = choose_checkpoint(run, mesh)
    load_weights(trainer.model, checkpoint.weights())
    load_optimizer(trainer.model, trainer.optimizer, checkpoint.optimizer(), checkpoint.step)
    if average is not None:
        average.load(checkpoint.average() or checkpoint.weights(), checkpoint.state.average_updates)
    trainer.load_state(checkpoint.state.trainer, rewound=True)
    states = checkpoint.state.random
    if len(states) == mesh.world_size:
        restore_generators(states[mesh.rank], mesh.device)
    trainer.step = checkpoint.step
    trainer.skipped = following - checkpoint.step
    back = failed_at - checkpoint.step
    trainer.event("rewind", checkpoint=checkpoint.folder.name, updates=back, batches_left_out=back + 1)
