"""Evaluate embedders on local collections and on mteb, in one table.

    python evaluate.py --model runs/quickstart/export docs-lm bm25 --tasks docs --search "shortest path in a graph"
    python evaluate.py --model runs/grl_llama3/export --tasks ../shared/data/cranfield path/to/any/beir/folder
    python evaluate.py --model runs/grl_llama3/export intfloat/e5-mistral-7b-instruct --tasks "MTEB(eng, v1)"

Results are kept under --output and reused for the same weights, settings, prompts and data; a second run is free.
"""

from __future__ import annotations

import sys

from ullme.eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
