import sys, json, dataclasses
from pathlib import Path
from demo.bootstrap import Plan, Runner, all_stages, keep_plan
root=Path("output/exp"); plan=Plan(seeds=1)
keep_plan(root, plan)
names=sys.argv[1:]
st=[s for s in all_stages(root,plan) if s.name in names]
Runner(root,1).run([dataclasses.replace(s, needs=()) for s in st])
