"""LOGITS → STEP: loss, optimizer, schedule, the trainer."""
