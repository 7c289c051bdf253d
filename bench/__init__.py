"""Benchmarks. Each module that starts without an underscore is one; all use `bench.harness`.

python -m bench                 run all of them        (make bench)
python -m bench.schemas         run one
options of both                 --quick  --rounds N  --json FILE
"""
