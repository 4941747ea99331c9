"""`regpt verify-receipt`: texts written again from their receipt."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from regpt.cli.parse import parse
from regpt.console.lines import print_line, print_note
from regpt.errors import UserError
from regpt.files import exists
from regpt.train.config import WritingPrecision

if TYPE_CHECKING:
    from regpt.engine.receipt import Origin, Receipt, Verified

EXACT = ("fp32", "fp64")


@dataclass(frozen=True)
class VerifyReceiptArgs:
    """Write the texts of a receipt again: the same tokens, or the first that differs, why it may, and exit code 1."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A receipt of regpt sample --receipt or of regpt serve; or a whole answer of the server that has one."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = ""
    """The model, as in regpt sample; default: the receipt's, where it is on this machine."""
    ema: bool = False
    """With the moving average of the weights."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, then MPS, then CPU."""
    precision: Literal["", WritingPrecision] = ""
    """Number format of the computation; default: the receipt's."""


def main(args: list[str]) -> int:
    given = parse(VerifyReceiptArgs, args, prog="regpt verify-receipt")
    from regpt.checkpoint.open import open_model
    from regpt.engine.receipt import Origin, read_receipt, reproduce
    from regpt.parallel.mesh import choose_device
    from regpt.train.precision import check_precision, set_matmul_precision, writing

    receipt = read_receipt(Path(given.file))
    precision: Any = given.precision or receipt.model.precision
    if precision not in get_args(WritingPrecision):
        allowed = ", ".join(get_args(WritingPrecision))
        raise UserError(
            f"the receipt has the number format {precision!r}, this regpt has {allowed}; choose --precision"
        )
    device = choose_device(given.device)
    check_precision(precision, device)
    opened = open_model(given.model or local_name(receipt.model.name), device, ema=given.ema)
    set_matmul_precision(precision)
    with writing(opened.model, precision, device):
        texts = reproduce(receipt, opened.model, opened.tokenizer)
    about = precision, device.type, receipt.model.kv_cache
    here = Origin(opened.source, opened.weights_sha256, opened.tokenizer.sha256, None, *about)
    for one in texts:
        print_line(f"> {one.text}")
    reasons = differences(receipt.model, here)
    for number, one in enumerate(texts):
        if one.differs is not None:
            said = f"text {number + 1} of {len(texts)} {first_difference(receipt, number, one, opened.tokenizer)}"
            raise UserError(f"{said}; {'; '.join(reasons or why_else(receipt))}")
    doubtful = sum(len(one.doubtful) for one in texts)
    tokens = sum(len(one.tokens) for one in receipt.texts)
    said = "all as in the receipt" if not doubtful else f"as in the receipt but for {doubtful} that rounding decides"
    count = f"{len(texts)} text{'s' if len(texts) > 1 else ''}, {tokens} token{'s' if tokens > 1 else ''}"
    print_line(f"{count}, {said}: weights {here.weights_sha256[:12]}…, {precision}, {device}")
    for reason in reasons:
        print_note(f"the same tokens, in spite of {reason}")
    return 0


def local_name(name: str) -> str:
    """A receipt's own name of its model, where it means something here: a receipt makes nobody download anything."""
    from regpt.hf.hub import SHORT_NAMES

    if exists(Path(name)) or name in SHORT_NAMES:
        return name
    raise UserError(f"the receipt's model is called {name!r}, which is nothing here; name it with --model MODEL")


def differences(there: "Origin", here: "Origin") -> list[str]:
    """In what the two models differ, as far as it may change a text."""
    pairs = {
        "other weights": (there.weights_sha256, here.weights_sha256),
        "another tokenizer": (there.tokenizer_sha256, here.tokenizer_sha256),
    }
    found = [f"{what} (SHA-256 {a} in the receipt, {b} here)" for what, (a, b) in pairs.items() if a != b]
    if there.precision != here.precision:
        found.append(f"another number format ({there.precision} in the receipt, {here.precision} here)")
    if there.device != here.device and not {there.precision, here.precision} <= {*EXACT}:
        found.append(f"another device ({there.device} in the receipt, {here.device} here)")
    return found


def why_else(receipt: "Receipt") -> list[str]:
    """Why texts of the same model may differ."""
    if receipt.model.precision in (*EXACT, "bf16-invariant") and not receipt.model.kv_cache:
        return [
            f"weights and format are the receipt's: it was changed, or written by other code ({receipt.regpt_version})"
        ]
    format = receipt.model.kv_cache or receipt.model.precision
    return [f"in {format} a token may depend on what else was written at the same time"]


def first_difference(receipt: "Receipt", number: int, one: "Verified", tokenizer: Any) -> str:
    from regpt.text.tokenizer import quoted

    def name(tokens: "list[int] | tuple[int, ...]") -> str:
        if at >= len(tokens):
            return "the end"
        known = 0 <= tokens[at] < tokenizer.n_vocab
        return f"{quoted(tokenizer.token_bytes(tokens[at]))} ({tokens[at]})" if known else str(tokens[at])

    at, given = one.differs or 0, receipt.texts[number].tokens
    return f"differs at token {at + 1} of {len(given)}: {name(given)} in the receipt, {name(one.tokens)} here"
