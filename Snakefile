"""From params/ to reports/: `snakemake --cores all reports/table2.md`, or any file below artifacts/.

  params/profiles/ ──> data ───┐
                               ├──> train ───> evaluate ───> track ────> table2 ──> reports/table2.md, .csv, ...
  csrc/ ─────────────> build ──┘      ^                     (MLflow)       ^
  params/runs.yaml, one row per run ──┘                                    │
  params/active.yaml: profile and seeds; reports/paper/: the claims ───────┘
  params/costs.yaml ─> count ─> tables ──> reports/index.md, table3.md, table8.md, slak/: what needs no training
  this machine ──────> bench ───> throughput ──> reports/table7.md, slak/table11.md, table12.md, fig4_right.md
  params/weights.yaml ─> convert ─> evaluate_released: published checkpoints; their accuracies stand in these tables

Beforehand:    snakemake -n
Other pages:   snakemake --cores all reports/table1.md    (any name under reports: in params/runs.yaml; rules page and figure)
One ablation:  snakemake --cores all artifacts/mini/train/sw11/seed0/metrics.json
Another scale: snakemake --cores all --config profile=smoke seeds=0,1    (kept in params/active.yaml, for DVC too)
"""

from snakemake.utils import min_version

min_version("9.0")


include: "workflow/rules/params.smk"
include: "workflow/rules/guard.smk"
include: "workflow/rules/results.smk"
include: "workflow/rules/build.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/weights.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/downstream.smk"
include: "workflow/rules/track.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/bench.smk"
include: "workflow/rules/record.smk"


rule all:
    default_target: True
    input:
        expand(rules.table2.output, report="table2"),
        rules.count.output,                                               # a clone has pages, and no note of what made them
        rules.tables.output,


onstart:
    activate()


onsuccess:
    record()


onerror:
    outdate_failed_report()
    record()
