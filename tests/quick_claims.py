"""Workers that take over claims in a bucket sooner, so that a test with many killed ones does not take minutes.

python -m tests.quick_claims [OPTIONS OF main.py]
"""

from __future__ import annotations

import runpy
import sys

from latent_encoder.outputs import bucket, claims
from tests.helpers import PROJECT

CLAIM_S = 3.0
"""Seconds in place of 15: longer than the calls of a publication take, each with 0.1 s more."""

if __name__ == "__main__":
    claims.CLAIM_S, claims.RENEW_S = CLAIM_S, CLAIM_S / 3
    bucket.QUICK_S = CLAIM_S / 3
    vars(claims)["QUICK_S"] = bucket.QUICK_S
    sys.argv = [str(PROJECT / "main.py"), *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
