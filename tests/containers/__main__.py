"""`./run.sh containers`: the image, docker-compose.yml and what they promise, held to it in real containers."""

import argparse
import re
import signal
import sys
import time
import traceback

import checks
from docker import ROOT, Daemon, LeftOut
from deployment import Site, images_named

FOLDER = ROOT / "target/containers"


def main():
    options = argparse.ArgumentParser(prog="./run.sh containers", description=__doc__)
    options.add_argument("--keep", action="store_true", help="keep the private daemon's images for the next run")
    options.add_argument("--only", default="", help="only the checks whose names this regular expression finds")
    options = options.parse_args()
    # So that the cleaning up below happens.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    daemon = Daemon(FOLDER / "docker")
    site = Site(FOLDER / "site")
    failed = []
    begin = time.monotonic()
    chosen = [check for check in checks.ALL if re.search(options.only, check.__doc__)]
    site.wants_before = any(check in chosen for check in checks.OF_BEFORE)
    try:
        daemon.find(images_named())
        site.daemon = daemon
        print(f"{'images':60} {time.monotonic() - begin:6.1f} s", flush=True)
        for check in checks.ALL:
            if check in chosen or check in checks.ALWAYS:
                if not passes(check, site):
                    failed.append(check.__doc__)
                    if check in checks.ALWAYS:
                        break
    except LeftOut as reason:
        print(f"left out: {reason}")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        site.remove()
        daemon.remove(options.keep)
    print(f"{'in all':60} {time.monotonic() - begin:6.1f} s")
    for name in failed:
        print(f"FAILED: {name}")
    return 1 if failed else 0


def passes(check, site):
    begin = time.monotonic()
    problem = left_out = None
    try:
        check(site)
    except LeftOut as reason:
        left_out = reason
    except Exception:
        problem = traceback.format_exc()
    word = "FAILED" if problem else "left out" if left_out else "ok"
    print(f"{check.__doc__:60} {time.monotonic() - begin:6.1f} s  {word}", flush=True)
    if left_out:
        print(f"    {left_out}")
    if problem:
        print(problem + site.logs(), flush=True)
        if check not in checks.ALWAYS:
            site.recover()
    return not problem


sys.exit(main())
