# Pages on runs: from metrics files and from what the papers print. They wait for the replay, so that one command does all.
# update, because the old page must stay where a new one fails: without it Snakemake deletes first.
# One rule, under three names for what is drawn beside the table: accuracy against distance (Table 2), nothing, two panels.
import logging
import re

from snakemake.logging import logger

REPORTS = ACTIVE.reports_folder


def drawn(*ends):
    """The reports that have these figures, as a pattern."""
    return "|".join(name for name, plan in PARAMS.reports.items() if plan.figures == ends) or "none"


def counts(wildcards):
    """What is counted of the table, where costs.yaml says so: its numbers do not depend on when they were counted."""
    return [ancient(f"reports/{wildcards.report}_counts.csv")] if wildcards.report in PARAMS.costs else []


def claims(wildcards):
    table = PARAMS.report(wildcards.report).claims
    return [f"reports/paper/{table}"] if table else []


def contents(*patterns):
    """Hash of files below artifacts/. No input: what is there is shown, and nothing is run for it."""
    digest = sha256()
    for pattern in patterns:
        for path in sorted(Path("artifacts").glob(pattern)):
            digest.update(f"{path}\n{path.read_text()}\n".encode())
    return digest.hexdigest()


def published(report):
    """Published weights that fill cells of a report's table, and what they measured."""
    table = (PARAMS.report(report).claims or "").removesuffix(".csv")
    rows = {name: row for name, row in PARAMS.weights.items() if any(fill.table == table for fill in row.fills)}
    shown = [row.model_dump_json(exclude={"url", "run"}) for row in rows.values()]
    return [*shown, contents(*(f"paper/released/{name}/*.json" for name in rows))] if rows else []


def extra(wildcards):
    """What a page shows that comes from no run."""
    plan, counted = PARAMS.report(wildcards.report), PARAMS.costs.get(wildcards.report)
    return [
        *([fingerprint("swconv.reporting.formulas")] if "formulas" in plan.sections else []),
        *([counted.model_dump_json(), fingerprint("swconv.reporting.costs")] if counted else []),
        *published(wildcards.report),
    ]


rule table2:
    input:
        results("train/metrics.json", "train/run.json", "evaluate/metrics.json", "evaluate/run.json", curves="train/log.jsonl"),
        tracked=rules.track.output,
        claims=claims,
        counts=counts,
    output:
        table=update(f"{REPORTS}/{{report}}.md"),
        cells=update(f"{REPORTS}/{{report}}.csv"),
        provenance=update(f"{REPORTS}/{{report}}.provenance.json"),
        figure=update(f"{REPORTS}/figures/{{report}}_distance.svg"),
    params:
        profile=ACTIVE.profile,
        seeds=report_seeds,
        plan=lambda wildcards: PARAMS.report(wildcards.report).model_dump_json(),
        rows=lambda wildcards: [PARAMS.runs[run].model_dump_json() for run in PARAMS.report_rows(wildcards.report)],
        others=other_results,
        extra=extra,
        code=fingerprint("swconv.reporting.report"),
        out=REPORTS,
    log:
        f"logs/report/{ACTIVE.profile}-{{report}}.log",
    wildcard_constraints:
        report=drawn("_distance.svg"),
    shell:
        "python -m swconv report {wildcards.report} --profile {params.profile} --seeds {params.seeds} --out {params.out}"
        " 2>&1 | tee {log}"


use rule table2 as page with:
    output:
        table=update(f"{REPORTS}/{{report}}.md"),
        cells=update(f"{REPORTS}/{{report}}.csv"),
        provenance=update(f"{REPORTS}/{{report}}.provenance.json"),
    wildcard_constraints:
        report=drawn(),


use rule table2 as figure with:
    output:
        table=update(f"{REPORTS}/{{report}}.md"),
        cells=update(f"{REPORTS}/{{report}}.csv"),
        provenance=update(f"{REPORTS}/{{report}}.provenance.json"),
        left=update(f"{REPORTS}/figures/{{report}}_left.svg"),
        right=update(f"{REPORTS}/figures/{{report}}_right.svg"),
        points=update(f"{REPORTS}/figures/{{report}}.csv"),
    wildcard_constraints:
        report=drawn("_left.svg", "_right.svg", ".csv"),


def outdate_failed_report():
    """Have the next command make a report that failed.

    Snakemake brings the old one back, with the date of now and a note that it was made from what the new one failed on.
    """
    for job in workflow.scheduler.failed:
        for path in filter(os.path.exists, job.output if job.rule.name in ("table2", "page", "figure") else []):
            workflow.persistence.cleanup_metadata(path)
            os.utime(path, LONG_AGO)


def belongs_elsewhere(wildcards):
    page = f"{wildcards.report}.md"
    sys.exit(
        f"reports/{page} shows the profiles mini and paper, but {ACTIVE.profile} is active (params/active.yaml), whose page is "
        f"{REPORTS}/{page}. For the other: snakemake --cores all reports/{page} --config profile=mini seeds=0,1,2"
    )


class UnknownPage(logging.Filter):
    """Tells of a misspelt page with the nearest one. No rule: all pages are known only when Snakemake has looked for one."""

    def filter(self, message):
        missing = re.search(r"^No rule to produce (\S*reports/\S+\.md) ", str(message.msg), re.MULTILINE)
        if missing and getattr(message, "exception", None) == "MissingRuleException":
            pages = [f"{folder}/{report}.md" for folder in (REPORTS, "reports") for report in PARAMS.reports]
            pages += [str(file) for rule in workflow.rules for file in rule.output if re.match(r"reports/[^{]+\.md$", file)]
            message.msg = f"{params_yaml._unknown('page', missing[1], pages)}."
        return True


if workflow.is_main_process:
    logger.addFilter(UnknownPage())


# Asked for while another profile is active, the committed page would pass for up to date.
if REPORTS != "reports":

    rule elsewhere:
        input:
            belongs_elsewhere,
        output:
            "reports/{report}.md",
        log:
            "logs/report/elsewhere-{report}.log",
        wildcard_constraints:
            report="|".join(PARAMS.reports),
        shell:
            "false > {log}"
