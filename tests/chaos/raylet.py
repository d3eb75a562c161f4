"""`ray start --address=...` for a second node beside the embedded head: all of it on loopback, as the head is.

Started as a script with the arguments of `ray`. With RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which keeps Ray's processes
on loopback, `ray start` refuses to join; without it Ray rewrites 127.0.0.1 to the machine's own address.
"""

from __future__ import annotations

import sys

from ray._private import ray_constants, services
from ray.scripts import scripts

if __name__ == "__main__":
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = lambda host: host
    sys.argv[0] = "ray"
    scripts.main()
