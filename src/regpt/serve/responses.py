"""`/v1/responses` without state: one text, whole or as OpenAI's named events."""

from collections.abc import Iterator, Mapping
from typing import Any

from regpt.serve.answers import Answer, Json, TextSoFar

ECHOED = ("instructions", "max_output_tokens", "temperature", "top_p", "user")


class ResponseShape:
    """Events with numbers in sequence, and the response that the last one holds.

    Args:
        fields: of the request; some are repeated in the answer.
    """

    repeats, kind, prefix = False, "response", "resp"
    ending: tuple[str, ...] = ()

    def __init__(self, fields: Mapping[str, Any]):
        self.echoed, self.sequence = {name: fields[name] for name in ECHOED}, 0

    def event(self, kind: str, **rest: Any) -> Json:
        self.sequence += 1
        return {"type": f"response.{kind}", "sequence_number": self.sequence - 1, **rest}

    def place(self, answer: Answer) -> Json:
        return {"item_id": answer.id.replace("resp", "msg"), "output_index": 0, "content_index": 0}

    def part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def message(self, answer: Answer, status: str, *parts: Json) -> Json:
        item = {"id": self.place(answer)["item_id"], "type": "message", "role": "assistant"}
        return {**item, "status": status, "content": list(parts)}

    def response(self, answer: Answer, status: str, output: list[Json]) -> Json:
        prompt, new = answer.counts()
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + new,
        }
        return {
            "id": answer.id,
            "object": "response",
            "created_at": answer.created,
            "model": answer.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": usage if output else None,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "store": False,
            "regpt": answer.extras() if output else {"seed": answer.seed},
            **self.echoed,
        }

    def opening(self, answer: Answer) -> Iterator[Json]:
        for kind in ("created", "in_progress"):
            yield self.event(kind, response=self.response(answer, "in_progress", []))
        yield self.event("output_item.added", output_index=0, item=self.message(answer, "in_progress"))
        yield self.event("content_part.added", part=self.part(""), **self.place(answer))

    def chunk(self, answer: Answer, piece: TextSoFar) -> Iterator[Json]:
        if piece.text:
            yield self.event("output_text.delta", delta=piece.text, logprobs=[], **self.place(answer))

    def closing(self, answer: Answer) -> Iterator[Json]:
        text, done = answer.texts[0].text, self.whole(answer)
        yield self.event("output_text.done", text=text, logprobs=[], **self.place(answer))
        yield self.event("content_part.done", part=self.part(text), **self.place(answer))
        yield self.event("output_item.done", output_index=0, item=done["output"][0])
        yield self.event(done["status"], response=done)

    def whole(self, answer: Answer) -> Json:
        """Incomplete where the text was cut by its limit of tokens."""
        text = answer.texts[0]
        status = "completed" if text.reason == "stop" else "incomplete"
        return self.response(answer, status, [self.message(answer, status, self.part(text.text))])
