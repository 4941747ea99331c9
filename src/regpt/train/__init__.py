"""LOGITS → STEP: loss, optimizer, schedule, the trainer. Called, it is `regpt.api.run.train`."""

import sys

import regpt

sys.modules[__name__].__class__ = regpt.CallablePackage
