"""A sweep as a job: ray job submit --working-dir . -- python jobs/tune.py my.toml [--set section.key=value ...]"""

import sys

from recray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    main()
