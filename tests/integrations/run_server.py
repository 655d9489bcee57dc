# SPDX-License-Identifier: Apache-2.0
"""run_server.py - answers requests to start `wan_attn run` by forking; see test_run.py.

The child falls through to the last lines: its exit code, its handlers and the way it ends are the
interpreter's own, as after `python -m wan_attn run`.
"""

import json
import os
import sys

import wan_attn.cli.run  # noqa: F401 - loads torch before the first fork
from wan_attn.__main__ import main

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(request["cwd"])
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.path[0] = request["cwd"]
        sys.argv[:] = ["wan_attn", "run", *request["words"]]
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()

raise SystemExit(main())
