"""`ray start` without the Ray Client server, which nobody here uses: one process and one open port less.

Started as a script with the arguments of `ray`.
"""

from __future__ import annotations

import sys

from ray.scripts import scripts

if __name__ == "__main__":
    # `ray start` leaves the server out where its dependencies are missing, and has no flag for it.
    scripts.get_ray_client_dependency_error = lambda: "not wanted"
    sys.argv[0] = "ray"
    scripts.main()
