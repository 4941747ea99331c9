"""`python -m regpt.tools.doctor.child GROUP`: a group of trials in a process of its own.

A trial may crash, hang, or leave a GPU in a state in which nothing works any more. Each one is printed as soon as it is
made, one JSON object a line, so that those before a crash are known.
"""

import json
import sys
import warnings
from dataclasses import asdict

from regpt.tools.doctor.device import GROUPS, devices
from regpt.tools.doctor.doctor import MARK

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for device in devices():
        for trial in GROUPS[sys.argv[1]](device):
            print(MARK + json.dumps(asdict(trial)), flush=True)
