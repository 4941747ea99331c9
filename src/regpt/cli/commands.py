"""The commands of `regpt`, and the dataclass of each one's arguments."""

from importlib import import_module

COMMANDS = {
    "quickstart": "text to a trained, evaluated and sampled model on this machine, in about two minutes",
    "data": "prepare, describe and verify token shards",
    "tokenizer": "train a byte-level BPE; look into any tokenizer",
    "doctor": "what this machine can do, tried; what is missing and how to get it",
    "plan": "parameters, memory, time and cost of a run, before it runs",
    "train": "train a model from a recipe, or go on with a run",
    "finetune": "train a model on conversations; look at what it is trained on",
    "chat-from-text": "texts to a model that answers and its page, in minutes",
    "eval": "validation loss, HellaSwag, CORE and other tasks of a model",
    "checkpoint": "list the checkpoints of a run; check every file of them",
    "runs": "every run below a folder: state, step, loss, speed, age",
    "replay": "one step of a run once more: its loss, norm and documents",
    "verify-resume": "a run that is killed again and again against one that is not, and a certificate",
    "sample": "write text with a model",
    "chat": "talk with a model",
    "serve": "answer OpenAI's clients with models, to this machine",
    "verify-receipt": "write a text again from its receipt, and say where it differs",
    "export": "write a model as a Hugging Face folder or a GGUF file",
    "report": "a run, or several over each other, as one self-contained page",
    "diff": "two runs against each other: what differs, and whether it matters",
    "scaling": "a power law through the losses of runs, and what it predicts",
    "inspect": "a model's parameters, pictures of its weights, tokens nearest to a token",
    "bench": "how fast training is on this machine",
    "explain": "what trains a GPT: text, a picture, a program and an exercise a topic",
    "completion": "a script with which the shell completes commands, flags and recipes",
}
ARGUMENTS = {  # what is typed: module in `regpt.cli`, dataclass
    "quickstart": ("quickstart", "Quickstart"),
    "data prepare": ("data_prepare", "PrepareArgs"),
    "data import": ("data_import", "ImportArgs"),
    "data info": ("data_info", "InfoArgs"),
    "data verify": ("data", "DataVerifyArgs"),
    "tokenizer train": ("tokenizer", "TrainArgs"),
    "tokenizer inspect": ("tokenizer_inspect", "TokenizerInspectArgs"),
    "doctor": ("doctor", "DoctorArgs"),
    "plan": ("plan", "PlanArgs"),
    "train": ("train", "Train"),
    "finetune": ("finetune", "Finetune"),
    "chat-from-text": ("chat_from_text", "ChatFromTextArgs"),
    "eval": ("eval", "EvalArgs"),
    "checkpoint list": ("checkpoint", "ListArgs"),
    "checkpoint verify": ("checkpoint", "CheckpointVerifyArgs"),
    "runs": ("runs", "RunsArgs"),
    "replay": ("replay", "Replay"),
    "verify-resume": ("verify_resume", "VerifyResumeArgs"),
    "sample": ("sample", "SampleArgs"),
    "chat": ("chat", "ChatArgs"),
    "serve": ("serve", "ServeArgs"),
    "verify-receipt": ("verify_receipt", "VerifyReceiptArgs"),
    "export": ("export", "Export"),
    "report": ("report", "ReportArgs"),
    "diff": ("diff", "DiffArgs"),
    "scaling": ("scaling", "ScalingArgs"),
    "inspect": ("inspect", "InspectArgs"),
    "bench train": ("bench", "BenchTrainArgs"),
    "explain": ("explain", "ExplainArgs"),
    "completion": ("completion", "CompletionArgs"),
}


def arguments(command: str) -> type:
    """The dataclass of `command`, such as `data prepare`."""
    module, name = ARGUMENTS[command]
    return getattr(import_module(f"regpt.cli.{module}"), name)
